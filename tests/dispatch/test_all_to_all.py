"""Dropless dispatch against experts that are all on one rank."""

import copy
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from expertmesh.dispatch.all_to_all import AllToAllDispatcher
from expertmesh.dispatch.collectives import all_reduce
from expertmesh.dispatch.static import StaticDispatcher
from expertmesh.experts import Experts, GatedMLPExperts, ModuleExperts
from expertmesh.kernels.dispatch import kernels, op
from expertmesh.layer import MoE
from expertmesh.parallel.experts import place_experts
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import Capacity, TopKRouter
from expertmesh.shards import is_sharded, shard_of
from expertmesh.testing import relative_error, run_on_ranks
from tests.dispatch.ranked import (
    DIM,
    EXPERTS,
    Case,
    HostAsked,
    compared,
    routing,
    without_host,
)

MESHES_OF_2 = [{"ep": 2}, {"etp": 2}]
MESHES_OF_4 = [{"ep": 4}, {"ep": 2, "etp": 2}, {"etp": 4}]


def cases(world: int) -> list[Case]:
    uneven = (5, 0, 11, 1)[:world]
    return [
        *(Case((7,) * world, k) for k in (1, 2, 3, 4)),
        Case(uneven, k=3),
        Case(tuple(reversed(uneven)), k=2, kept=0.3),
        Case((6,) * world, only=EXPERTS - 1),
        Case(uneven, only=0, kept=1 - 1e-9),
        Case((4,) * world, kept=1e-9),
        Case((0,) * world),
        Case((1,) + (0,) * (world - 1), k=4, kept=1 - 1e-9),
    ]


def owners(case: Case, token: int, ep: int) -> set[int]:
    """The expert-parallel places that a token is sent to."""
    chosen = [e for e in case.choices()[token].tolist() if e < EXPERTS]
    return {e // (EXPERTS // ep) for e in chosen}


@pytest.mark.parametrize("axes", MESHES_OF_2 + MESHES_OF_4, ids=str)
def test_outputs_and_gradients_are_those_of_whole_experts(axes: dict[str, int]) -> None:
    ep, etp = axes.get("ep", 1), axes.get("etp", 1)
    world = ep * etp
    views = run_on_ranks(world, compared, axes, "all_to_all", cases(world))
    for place, case in enumerate(cases(world)):
        destinations = [owners(case, token, ep) for token in range(case.num_tokens)]
        for rank in range(world):
            seen = views[rank][place]
            assert max(seen.errors.values()) < 1e-13, (case, rank, seen.errors)
            # A token comes once, however many of its experts are here.
            assert seen.num_rows == sum(rank // etp in places for places in destinations)
            own = destinations[case.own(rank)]
            leaving = sum(len(places) * etp - (rank // etp in places) for places in own)
            kept = sum(rank // etp in places for places in own)
            arriving = seen.num_rows - kept
            assert seen.bytes_sent == {
                "counts": (world - 1) * 4,
                "dispatch": leaving * DIM * 8,
                "choices": leaving * case.k * (4 + 8),  # ids and weights
                "combine": arriving * DIM * 8,
                "combine backward": leaving * DIM * 8,
                "dispatch backward": arriving * DIM * 8,
                "weights backward": arriving * case.k * 8,
            }


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_narrow_rows(dtype: torch.dtype, limit: float) -> None:
    case = Case((9, 4), k=3, dtype=dtype)
    for (seen,) in run_on_ranks(2, compared, {"ep": 2}, "all_to_all", [case]):
        assert max(seen.errors.values()) < limit, seen.errors
        assert seen.bytes_sent["dispatch"] % (DIM * dtype.itemsize) == 0


@dataclass(frozen=True)
class Rounded:
    """A layer under autocast on a mesh: errors against one process, and what was sent."""

    errors: dict[str, float]
    bytes_sent: dict[str, int]
    dtypes: set[torch.dtype]


def under_autocast(kind: str, dispatch: str, dtype: torch.dtype) -> Rounded:
    """Forward and backward of experts of a kind, with float32 tokens and parameters."""
    mesh = Mesh(ep=2)
    capacity = Capacity(factor=4.0) if dispatch == "static" else None
    router = TopKRouter(32, EXPERTS, 2, capacity=capacity, seed=0)
    if kind == "module":
        experts: Experts = ModuleExperts(lambda: nn.Linear(32, 32), EXPERTS, dim=32, seed=0)
    else:
        experts = GatedMLPExperts(32, 24, EXPERTS, seed=0)
    whole = MoE(router, experts)
    dealt = copy.deepcopy(whole)
    place_experts(dealt, mesh, dispatch=dispatch)
    group = mesh.group(("ep", "etp"))
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(40, 32, generator=generator)
    own = slice(0, 17) if group.index == 0 else slice(17, 40)
    out: list[Tensor] = []
    grads: list[Tensor] = []
    for moe, part in ((whole, slice(0, 40)), (dealt, own)):
        given_TD = x_TD[part].clone().requires_grad_()
        key = RandomKey.of(0, 0, torch.arange(40)[part])
        with torch.autocast("cpu", dtype=dtype):
            y_TD = moe(given_TD, key=key)
        y_TD.backward(torch.sin(3 * x_TD[part]))
        assert given_TD.grad is not None
        out.append(y_TD.detach())
        grads.append(given_TD.grad)
    dtypes = {out[1].dtype, grads[1].dtype}
    errors = {
        "output": relative_error(out[1], out[0][own]),
        "x gradient": relative_error(grads[1], grads[0][own]),
    }
    for (name, param), reference in zip(dealt.named_parameters(), whole.parameters(), strict=True):
        assert param.grad is not None
        assert reference.grad is not None
        box = shard_of(param.grad)
        grad = box.local
        if not is_sharded(param):  # the router's: each rank has its tokens' part
            grad = all_reduce(grad, group)
        ends = zip(box.offset, box.local.shape, strict=True)
        inside = tuple(slice(begin, begin + size) for begin, size in ends)
        errors[name] = relative_error(grad, reference.grad[inside])
        dtypes.add(grad.dtype)
    return Rounded(errors, dict(group.traffic.bytes_sent), dtypes)


@pytest.mark.parametrize("dispatch", ["all_to_all", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_travel_in_what_the_experts_compute_in(dispatch: str, dtype: torch.dtype) -> None:
    limit = 4 * torch.finfo(dtype).eps
    for seen in run_on_ranks(2, under_autocast, "gated", dispatch, dtype):
        assert max(seen.errors.values()) < limit, seen.errors
        assert seen.dtypes == {torch.float32}
        rows = seen.bytes_sent["choices"] // (2 * (4 + 4))
        assert seen.bytes_sent["dispatch"] == rows * 32 * 2
        assert seen.bytes_sent["combine backward"] == rows * 32 * 2
        assert seen.bytes_sent["combine"] == seen.bytes_sent["dispatch backward"]


def test_experts_that_may_compute_wider_get_what_they_would_get_alone() -> None:
    for seen in run_on_ranks(2, under_autocast, "module", "all_to_all", torch.bfloat16):
        assert seen.errors["output"] < 1e-6
        rows = seen.bytes_sent["choices"] // (2 * (4 + 4))
        assert seen.bytes_sent["dispatch"] == rows * 32 * 4


def bitwise_repeats() -> bool:
    """Twice the same call, in evaluation."""
    group = Mesh(ep=2).group(("ep", "etp"))
    case = Case((9, 4), k=3)
    own = case.own(group.index)
    results = []
    for _ in range(2):
        dispatcher = AllToAllDispatcher(group, EXPERTS)
        with torch.no_grad():
            sent = dispatcher.dispatch(
                case.tokens()[own], routing(case.choices()[own], case.weights()[own])
            )
            results.append(dispatcher.combine(sent.x_RD, sent.context))
    return torch.equal(*results)


def test_the_same_call_gives_the_same_bits() -> None:
    assert run_on_ranks(2, bitwise_repeats) == [True, True]


def passed(dispatcher: AllToAllDispatcher | StaticDispatcher, case: Case) -> list[Tensor]:
    """What comes, what is home again, and the gradients, with something in place of experts."""
    index = dispatcher.group.index
    own = case.own(index)
    x_TD = case.tokens()[own].requires_grad_()
    weight_TK = case.weights()[own].requires_grad_()
    decided = routing(case.choices()[own], weight_TK, case.most_per_expert(index))
    sent = dispatcher.dispatch(x_TD, decided)
    y_RD = sent.x_RD * (sent.weight_RK * torch.cos(sent.expert_RK)).sum(dim=1, keepdim=True)
    y_TD = dispatcher.combine(y_RD, sent.context)
    grads = torch.autograd.grad(y_TD, [x_TD, weight_TK], torch.sin(x_TD.detach()))
    return [sent.x_RD, sent.expert_RK, sent.weight_RK, y_TD, *grads]


def same_bits_by_kernels(axes: dict[str, Any], static: bool) -> list[bool]:
    """For every case, in Triton's interpreter and by torch's operations."""
    group, etp = Mesh(**axes).group(("ep", "etp")), axes.get("etp", 1)
    kind = StaticDispatcher if static else AllToAllDispatcher
    same = []
    for case in (Case((7, 7), 3), Case((5, 0), 1), Case((6, 6), 4, only=3), Case((0, 0))):
        case = replace(case, dtype=torch.float32)
        plain = passed(kind(group, EXPERTS, etp), case)
        with (
            mock.patch.object(op, "_has_kernels", return_value=True),
            mock.patch.object(kernels, "destinations", wraps=kernels.destinations) as asked,
        ):
            ours = passed(kind(group, EXPERTS, etp), case)
        assert asked.called == (case.sizes[group.index] > 0)
        same.append(all(map(torch.equal, plain, ours)))
    return same


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("axes", MESHES_OF_2, ids=str)
def test_kernels_change_no_bit(axes: dict[str, int], static: bool) -> None:
    assert run_on_ranks(2, same_bits_by_kernels, axes, static) == [[True] * 4] * 2


def asks_the_host() -> bool:
    group = Mesh(ep=2).group(("ep", "etp"))
    case = Case((3, 3))
    own = case.own(group.index)
    with without_host():
        try:
            AllToAllDispatcher(group, EXPERTS).dispatch(
                case.tokens()[own], routing(case.choices()[own], case.weights()[own])
            )
        except HostAsked:
            return True
    return False


def test_the_host_learns_the_row_counts() -> None:
    # That is also why `without_host` tells something about static dispatch.
    assert run_on_ranks(2, asks_the_host) == [True, True]
