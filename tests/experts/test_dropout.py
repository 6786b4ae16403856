"""Expert dropout: off in evaluation, the same on every mesh and under recompute."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.experts import (
    DoublyGatedMLPExperts,
    Experts,
    GatedMLPExperts,
    MLPExperts,
    ModuleExperts,
)
from expertmesh.experts.scaled_input import ScaledInputExperts
from expertmesh.layer import MoE
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import ExpertChoiceRouter, Router, TopKRouter
from expertmesh.soft_moe import SoftMoE
from expertmesh.testing import run_on_ranks
from tests.distributed.layers import DIM, assert_same, pass_through, tokens
from tests.parallel.sliced import Case, largest_errors

E, P = 4, 0.4
KINDS = {
    "gated": GatedMLPExperts,
    "plain": MLPExperts,
    "doubly gated": DoublyGatedMLPExperts,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def experts_of(kind: type[Experts] = GatedMLPExperts, dropout: float = P) -> Any:
    return kind(DIM, 8, E, init_std=0.5, seed=1, dropout=dropout).double()  # type: ignore[call-arg]  # one of KINDS


def layer(router: Router | None = None, experts: Experts | None = None) -> MoE:
    router = router or TopKRouter(DIM, E, 2, init_std=1.0, seed=1, layer=3)
    return MoE(router, experts or experts_of()).double()


def key(step: int = 1, count: int = 12) -> RandomKey:
    return RandomKey.of(3, step, torch.arange(count))


@kinds
def test_evaluation_drops_nothing(kind: type[Experts]) -> None:
    plain, dropping = layer(experts=experts_of(kind, 0.0)), layer(experts=experts_of(kind))
    x = tokens(12)
    assert torch.equal(plain.eval()(x, key=key()), dropping.eval()(x, key=key()))
    plain.train()
    dropping.train()
    assert not torch.equal(plain(x, key=key()), dropping(x, key=key()))


@kinds
def test_numbers_are_a_function_of_step_layer_and_token(kind: type[Experts]) -> None:
    moe, x = layer(experts=experts_of(kind)), tokens(12)
    y = moe(x, key=key())
    assert torch.equal(moe(x, key=key()), y)
    assert not torch.equal(moe(x, key=key(2)), y)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    moved = moe(x[order], key=RandomKey(key().seed, order))
    torch.testing.assert_close(moved, y[order])
    part = moe(x[4:7], key=RandomKey(key().seed, torch.arange(4, 7)))
    torch.testing.assert_close(part, y[4:7])
    moe.router.layer = 4
    assert not torch.equal(moe(x, key=key()), y)


def test_the_mean_over_steps_is_the_output_without() -> None:
    """Down projections are linear, so the scale 1 / (1 - p) makes the mean right."""
    plain, dropping = layer(experts=experts_of(dropout=0.0)), layer()
    x, count = tokens(4), 500
    ys = torch.stack([dropping(x, key=key(step, 4)) for step in range(count)])
    error = (ys.mean(0) - plain(x, key=key(1, 4))).abs()
    assert (error < 5 * ys.std(0) / count**0.5).all()


def test_without_a_key_torchs_generator_decides() -> None:
    moe, x = layer(), tokens(12)
    ys = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        ys.append(moe(x))
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])
    experts, ids = experts_of(), torch.zeros(12, 1, dtype=torch.int64)
    torch.manual_seed(0)
    first = experts(x, ids, torch.ones(12, 1))
    torch.manual_seed(0)
    assert torch.equal(experts(x, ids, torch.ones(12, 1)), first)
    assert not torch.equal(experts(x, ids, torch.ones(12, 1)), first)


def test_scaled_inputs_and_choices_of_experts_drop_too() -> None:
    x = tokens(12)
    for moe in (
        layer(experts=ScaledInputExperts(experts_of())),
        layer(ExpertChoiceRouter(DIM, E, 2.0, init_std=1.0, seed=1)),
    ):
        y = moe(x, key=key())
        assert torch.equal(moe(x, key=key()), y)
        assert not torch.equal(moe(x, key=key(2)), y)


def test_soft_moe_drops_by_the_step() -> None:
    soft = SoftMoE(experts_of(), 2, seed=0).double()
    x, index = tokens(12).view(2, 6, DIM), torch.arange(12).view(2, 6)
    y = soft(x, key=RandomKey.of(3, 1, index))
    assert torch.equal(soft(x, key=RandomKey.of(3, 1, index)), y)
    assert not torch.equal(soft(x, key=RandomKey.of(3, 2, index)), y)
    second = soft(x[1:], key=RandomKey.of(3, 1, index[1:]))
    torch.testing.assert_close(second, y[1:])


def test_experts_that_know_of_no_dropout_are_not_told() -> None:
    assert ModuleExperts(lambda: torch.nn.Linear(2, 2), 2, dim=2).dropout == 0


@kinds
@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_bad_values_are_refused(kind: type[Experts], p: float) -> None:
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        experts_of(kind, p)


ROUTERS = {
    "token": lambda: TopKRouter(DIM, E, 2, init_std=1.0, seed=1),
    "expert": lambda: ExpertChoiceRouter(DIM, E, 2.0, init_std=1.0, seed=1),
}
MESHES: dict[str, dict[str, int]] = {"ep": {"ep": 2}, "etp": {"etp": 2}, "edp": {"edp": 2}}


def on_meshes(kind: type[Experts], chosen_by: str) -> list[Any]:
    """What this rank sees on each mesh, and with static dispatch."""
    seen = []
    for axes in MESHES.values():
        mesh = Mesh(**axes)
        moe = parallelize(layer(ROUTERS[chosen_by](), experts_of(kind)), mesh)
        seen.append(pass_through(moe, mesh, 12))
    return seen


@pytest.mark.parametrize("chosen_by", ROUTERS)
@kinds
def test_every_mesh_drops_the_same(kind: type[Experts], chosen_by: str) -> None:
    expected = pass_through(layer(ROUTERS[chosen_by](), experts_of(kind)), Mesh(), 12)
    by_rank = run_on_ranks(2, on_meshes, kind, chosen_by)
    for views in zip(*by_rank, strict=True):
        assert_same(views, expected)


DECODER: dict[str, Any] = {
    "vocab_size": 31,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "max_seq_len": 16,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 12,
    "expert_dropout": P,
    "router_options": {"balance_coef": 0},
    "init_std": 0.3,
}


@pytest.mark.parametrize("axes", [{"tp": 2}, {"cp": 2}], ids=str)
def test_a_sliced_decoder_drops_the_same(axes: dict[str, int]) -> None:
    for errors in run_on_ranks(2, largest_errors, axes, DECODER, [Case(5), Case(6)], True):
        assert max(errors.values()) < 1e-11, errors


@pytest.mark.parametrize("keyed", [True, False], ids=["key", "generator"])
def test_recompute_drops_the_same(keyed: bool) -> None:
    ids = torch.arange(12).view(2, 6)
    gradients: list[dict[str, Tensor]] = []
    for saving in (False, True):
        model = DecoderLM(DecoderConfig(**DECODER)).double()
        if saving:
            model.checkpoint_blocks()
        torch.manual_seed(0)
        logits = model(ids, key=RandomKey.of(0, 1, ids) if keyed else None)
        logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
    model.eval()
    assert torch.equal(model(ids), model(ids))
