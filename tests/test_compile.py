"""torch.compile: the same outputs, gradients and counters; `aot_eager` traces only."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import expertmesh as em
from expertmesh.models import DecoderConfig, DecoderLM

DIM, EXPERTS = 8, 4


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch.compiler.reset()


def run(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = forward()
    y.square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def check_same(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])


ROUTERS: dict[str, dict[str, object]] = {
    "losses": {"losses": [em.LoadBalancingLoss(coef=0.1), em.ZLoss(coef=0.1)]},
    "noise and capacity": {
        "noise": em.NormalNoise(1.0),
        "capacity": em.Capacity(factor=0.5),
        "losses": [em.LoadBalancingLoss(coef=0.1)],
    },
}


@pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())
def test_the_compiled_layer_is_the_layer(options: dict[str, object]) -> None:
    router = em.TopKRouter(DIM, EXPERTS, 2, seed=0, **options)  # type: ignore[arg-type]  # a dict
    moe = em.MoE(router, em.GatedMLPExperts(DIM, 16, EXPERTS, seed=0))
    x = torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0))
    key = em.RandomKey.of(0, 1, torch.arange(12).view(2, 6))
    expected = run(moe, lambda: moe(x, key=key))
    load = moe.metrics()["load"].value
    compiled = torch.compile(moe, backend="aot_eager")
    check_same(run(moe, lambda: compiled(x, key=key)), expected)
    assert torch.equal(moe.metrics()["load"].value, load)


def test_the_layer_is_one_graph() -> None:
    moe = em.MoE(
        em.TopKRouter(DIM, EXPERTS, 2, noise=em.NormalNoise(), losses=[em.ZLoss(coef=0.1)]),
        em.GatedMLPExperts(DIM, 16, EXPERTS),
    )
    key = em.RandomKey.of(0, 1, torch.arange(3))
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    compiled(torch.ones(3, DIM), key=key).sum().backward()
    assert moe.metrics()["load"].value.sum() == 6


OPENMOE: dict[str, Any] = {
    "attention_scale": 1.0,
    "mlp": "doubly_gated",
    "dense_hidden": 12,
    "extra_mlp": True,
    "router": "openmoe",
}


@pytest.mark.parametrize(
    ("saving", "changes"),
    [
        pytest.param(False, {}, id="plain"),
        pytest.param(True, {}, id="checkpointed", marks=pytest.mark.slow),
        pytest.param(False, OPENMOE, id="openmoe", marks=pytest.mark.slow),
    ],
)
def test_the_compiled_decoder_is_the_decoder(saving: bool, changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "vocab_size": 32,
        "dim": DIM,
        "num_layers": 1,
        "num_heads": 2,
        "num_experts": EXPERTS,
        "experts_per_token": 2,
        "expert_hidden": 16,
        "router": "gshard",
    }
    model = DecoderLM(DecoderConfig(**(fields | changes)))
    if saving:
        model.checkpoint_blocks()
    tokens = torch.arange(12).view(2, 6)
    key = em.RandomKey.of(0, 1, tokens)
    expected = run(model, lambda: model(tokens, key=key))
    (moe,) = em.moe_layers(model).values()
    load = moe.metrics()["load"].value
    compiled = torch.compile(model, backend="aot_eager")
    check_same(run(model, lambda: compiled(tokens, key=key)), expected)
    assert torch.equal(moe.metrics()["load"].value, load)
