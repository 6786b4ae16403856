"""Identities of layers with their past, their ranks and their dense origin, on drawn shapes."""

import dataclasses
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import Capacity, HashRouter, LoadBalancingLoss, TopKRouter, random_table
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble, by_name, pieces
from tests.routing.test_identities import ORDERS, SEEDS, SMALL, alike, expert, normal


@SMALL
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from(["token", "previous"]), SEEDS)
def test_a_hash_table_comes_back_with_the_state(num_ids, num_experts, by, seed):
    """Saved to bytes, loaded into a router of another table: the same routing."""
    tables = [random_table(num_ids, num_experts, seed=s) for s in (seed, seed + 1)]
    first, other = (HashRouter(3, num_experts, table, by=by) for table in tables)
    ids_T = torch.randint(num_ids, (12,), generator=torch.Generator().manual_seed(seed))
    kept = io.BytesIO()
    torch.save(first.state_dict(), kept)
    kept.seek(0)
    other.load_state_dict(torch.load(kept))
    x = torch.zeros(12, 3)
    one, two = (r(x, token_ids=ids_T, sequence_length=4) for r in (first, other))
    assert torch.equal(one.expert_TK, two.expert_TK)


@SMALL
@given(st.integers(0, 9), st.integers(1, 6), SEEDS)
def test_hashed_experts_that_all_hold_the_teachers_units_are_the_teacher(count, num_experts, seed):
    """A dense layer split into experts that share every unit, tokens dealt out by a table."""
    experts = GatedMLPExperts(5, 7, num_experts, init_std=0.5, seed=seed).double()
    alike(experts)
    moe = MoE(HashRouter(5, num_experts, random_table(11, num_experts, seed=seed)), experts)
    ids_T = torch.randint(11, (count,), generator=torch.Generator().manual_seed(seed))
    x = normal(seed, count, 5)
    assert_close("teacher", moe(x, token_ids=ids_T), expert(experts, 0, x))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A layer and its tokens."""

    counts: tuple[int, int]
    num_experts: int
    k: int
    seed: int
    kind: str
    capacity: Capacity | None


@st.composite
def layers(draw: Any) -> Drawn:
    num_experts = 2 * draw(st.integers(1, 3))
    capacity = st.builds(Capacity, factor=st.floats(0.3, 2.0), order=st.sampled_from(ORDERS))
    return Drawn(
        counts=(draw(st.integers(0, 6)), draw(st.integers(0, 6))),
        num_experts=num_experts,
        k=draw(st.integers(1, num_experts)),
        seed=draw(SEEDS),
        kind=draw(st.sampled_from(["spread", "ties", "extreme"])),
        capacity=draw(st.none() | capacity),
    )


def examples(count: int) -> list[Drawn]:
    """As many as hypothesis draws: ranks are asked for all of them at once."""
    found: list[Drawn] = []

    @settings(deadline=None, max_examples=count, derandomize=True)
    @given(layers())
    def collect(drawn: Drawn) -> None:
        found.append(drawn)

    collect()
    return found


def passed(drawn: Drawn, mesh: Mesh) -> dict[str, Any]:
    """One pass of the layer: output and gradients."""
    num_experts, total = drawn.num_experts, sum(drawn.counts)
    router = TopKRouter(
        5,
        num_experts,
        drawn.k,
        init_std=1.0,
        seed=0,
        capacity=drawn.capacity,
        losses=(LoadBalancingLoss(coef=0.1),),
    )
    experts = GatedMLPExperts(5, 6, num_experts, init_std=0.5, seed=0)
    moe = parallelize(MoE(router, experts).double(), mesh)
    x = normal(drawn.seed, total, 5)
    if drawn.kind != "spread":
        x = x.round() if drawn.kind == "ties" else 1e4 * x.sign()
    begin = drawn.counts[0] if mesh.stage.index else 0
    own = slice(begin, begin + drawn.counts[mesh.stage.index]) if mesh.world > 1 else slice(None)
    x_TD = x[own].clone().requires_grad_()
    y_TD = moe(x_TD, key=RandomKey.of(0, 1, torch.arange(total)[own]))
    (y_TD * torch.sin(normal(1, total, 5)[own])).sum().backward()
    gradients = ((n, p.grad) for n, p in moe.named_parameters() if p.grad is not None)
    return {"y": y_TD.detach(), "dx": x_TD.grad, "gradients": pieces(gradients)}


def on_rank(drawn: list[Drawn]) -> list[dict[str, Any]]:
    mesh = Mesh(ep=2)
    return [passed(case, mesh) for case in drawn]


def test_experts_dealt_out_over_ranks_are_experts_of_one_process() -> None:
    cases = examples(12)
    assert len(cases) == 12
    for drawn, *views in zip(cases, *run_on_ranks(2, on_rank, cases), strict=True):
        expected = passed(drawn, Mesh())
        for name in ("y", "dx"):
            together: Tensor = torch.cat([view[name] for view in views])
            assert_close(f"{name} of {drawn}", together, expected[name], 1e-12)
        gradients = [view["gradients"] for view in views]
        errors = by_name(assemble(gradients), assemble([expected["gradients"]]))
        scale = max(float(p.local.norm()) for p in expected["gradients"].values())
        assert max(errors.values()) < 1e-9 or scale < 1e-9, (drawn, errors)


@pytest.mark.parametrize("kind", ["spread", "ties", "extreme"])
def test_cases_of_every_kind_are_drawn(kind: str) -> None:
    assert any(case.kind == kind for case in examples(12))
