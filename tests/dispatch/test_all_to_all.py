"""Dropless dispatch against experts that are all on one rank."""

import pytest
import torch

from expertmesh.dispatch.all_to_all import AllToAllDispatcher
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks
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
                "ids": leaving * case.k * 4,
                "dispatch": leaving * DIM * 8,
                "weights": leaving * case.k * 8,
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
