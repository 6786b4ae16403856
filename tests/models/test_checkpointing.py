"""Activation checkpointing: the same gradients, bit for bit, and one routing decision."""

import pytest
import torch
from torch import Tensor

from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.random import RandomKey
from tests.models.conftest import GROUPED, SHAPES


def gradients(model: DecoderLM, tokens: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model(tokens).square().mean().backward()
    return {name: param.grad for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    "changes", [{}, {"router": "switch", "experts_per_token": 1}, {"router": "gshard"}], ids=str
)
def test_gradients_are_the_same(changes: dict, tokens: Tensor) -> None:
    config = DecoderConfig(**{**GROUPED, **changes})
    plain, saving = DecoderLM(config).double(), DecoderLM(config).double()
    saving.checkpoint_blocks()
    expected, actual = gradients(plain, tokens), gradients(saving, tokens)
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


RANDOM_DROPS = {
    "router": "switch",
    "experts_per_token": 1,
    "router_options": {"capacity": {"factor": 0.5, "order": "random"}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_and_random_drops_come_back_by_key_and_under_autocast(
    dtype: torch.dtype, tokens: Tensor
) -> None:
    key = RandomKey.of(0, 3, torch.arange(tokens.numel()).view_as(tokens))
    grads, dropped = [], []
    for saving in (False, True):
        model = DecoderLM(DecoderConfig(**{**GROUPED, **RANDOM_DROPS}))
        if saving:
            model.checkpoint_blocks()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = model(tokens, key=key)
        logits.float().square().mean().backward()
        grads.append({name: param.grad for name, param in model.named_parameters()})
        dropped.append(model.blocks[1].moe.metrics()["dropped"].value)
    assert dropped[0].sum() > 0
    assert torch.equal(*dropped)
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_latent_gradients_are_the_same(tokens: Tensor) -> None:
    config = DecoderConfig(**SHAPES["latent"])
    plain, saving = DecoderLM(config).double(), DecoderLM(config).double()
    saving.checkpoint_blocks()
    expected, actual = gradients(plain, tokens), gradients(saving, tokens)
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


def test_recompute_does_not_decide_again(tokens: Tensor) -> None:
    """With the router turned round between forward and backward, the same experts get gradients."""
    model = DecoderLM(DecoderConfig(**{**GROUPED, "router_options": {"balance_coef": 0}})).double()
    model.checkpoint_blocks()
    record: dict = {}
    logits = model(tokens[:1, :2], record=record)
    decided = record[1]
    with torch.no_grad():
        model.blocks[1].moe.router.weight_ED.neg_()
    logits.square().mean().backward()
    assert record[1] is decided
    grad = model.blocks[1].moe.experts.down.grad
    touched = set(grad.flatten(1).abs().sum(dim=1).nonzero().flatten().tolist())
    assert touched == set(decided.expert_TK.flatten().tolist())
    assert len(touched) < 4


def test_counters_count_once(tokens: Tensor) -> None:
    model = DecoderLM(DecoderConfig(**GROUPED))
    model.checkpoint_blocks()
    model(tokens).sum().backward()
    assert model.blocks[1].moe.metrics()["load"].value.sum() == 2 * tokens.numel()


def test_less_is_kept(tokens: Tensor) -> None:
    kept = []
    for saving in (False, True):
        model = DecoderLM(DecoderConfig(**GROUPED))
        if saving:
            model.checkpoint_blocks()
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(tokens)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
