"""Dispatch in parts of a fixed size: the same numbers, and nothing that the host waits for."""

from typing import Any

import pytest
import torch

from expertmesh.dispatch.collectives import Group
from expertmesh.dispatch.static import StaticDispatcher
from expertmesh.errors import UserError
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks
from tests.dispatch.ranked import DIM, EXPERTS, Case, compared, routing, without_host
from tests.dispatch.test_all_to_all import MESHES_OF_2, MESHES_OF_4, cases


@pytest.mark.parametrize("axes", MESHES_OF_2 + MESHES_OF_4, ids=str)
def test_outputs_and_gradients_are_those_of_whole_experts(axes: dict[str, int]) -> None:
    ep, etp = axes.get("ep", 1), axes.get("etp", 1)
    world = ep * etp
    views = run_on_ranks(world, compared, axes, "static", cases(world))
    for place, case in enumerate(cases(world)):
        bounds = [EXPERTS // ep * case.most_per_expert(rank) for rank in range(world)]
        slots = max(min(size, bound) for size, bound in zip(case.sizes, bounds, strict=True))
        for rank in range(world):
            seen = views[rank][place]
            assert max(seen.errors.values()) < 1e-13, (case, rank, seen.errors)
            assert seen.num_rows == world * slots
            leaving = (world - 1) * slots
            wide, narrow = leaving * DIM * 8, leaving * case.k * 8
            assert seen.bytes_sent == {
                "sizes": (world - 1) * 8,  # agreed on once
                "dispatch": wide,
                "choices": leaving * case.k * (4 + 8),  # ids and weights
                "combine": wide,
                "combine backward": wide,
                "dispatch backward": wide,
                "weights backward": narrow,
            }


def call(dispatcher: StaticDispatcher, case: Case, most: int) -> torch.Tensor:
    """Forward and backward with an identity in place of the experts."""
    own = case.own(dispatcher.group.index)
    x_TD = case.tokens()[own].requires_grad_()
    sent = dispatcher.dispatch(x_TD, routing(case.choices()[own], case.weights()[own], most))
    y_TD = dispatcher.combine(sent.x_RD * sent.weight_RK.sum(dim=1, keepdim=True), sent.context)
    y_TD.sum().backward()
    return y_TD.detach()


def calls_after_the_first() -> list[torch.Tensor]:
    dispatcher = StaticDispatcher(Mesh(ep=2).group(("ep", "etp")), EXPERTS)
    outputs = [call(dispatcher, Case((8, 8)), most=8)]
    for case in (Case((8, 8)), Case((2, 5)), Case((0, 1))):
        own = case.own(dispatcher.group.index)
        x_TD = case.tokens()[own].requires_grad_()
        most = case.most_per_expert(dispatcher.group.index)
        decided = routing(case.choices()[own], case.weights()[own], most)
        with without_host():
            sent = dispatcher.dispatch(x_TD, decided)
            y_RD = sent.x_RD * sent.weight_RK.sum(dim=1, keepdim=True)
            y_TD = dispatcher.combine(y_RD, sent.context)
            y_TD.sum().backward()
        outputs.append(y_TD.detach())
    return outputs


def test_calls_after_the_first_never_wait_for_the_device() -> None:
    cases = [Case((8, 8)), Case((8, 8)), Case((2, 5)), Case((0, 1))]
    for rank, outputs in enumerate(run_on_ranks(2, calls_after_the_first)):
        for case, y_TD in zip(cases, outputs, strict=True):
            own = case.own(rank)
            expected = case.tokens()[own] * case.weights()[own].sum(dim=1, keepdim=True)
            torch.testing.assert_close(y_TD, expected)


def refusals() -> list[str]:
    dispatcher = StaticDispatcher(Mesh(ep=2).group(("ep", "etp")), EXPERTS)
    call(dispatcher, Case((4, 4)), most=2)
    messages = []
    attempts: list[tuple[Case, Any]] = [(Case((5, 5)), 3), (Case((4, 4)), None)]
    for case, most in attempts:
        try:
            call(dispatcher, case, most)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_what_does_not_fit_is_refused() -> None:
    for more, dropless in run_on_ranks(2, refusals):
        assert "agreed on 4 rows per pair of ranks" in more
        assert "this call needs 5; begin with the largest batch" in more
        assert "needs a router with a capacity, got dropless routing" in dropless


def test_a_router_without_capacity_is_refused_before_anything_is_sent() -> None:
    dispatcher = StaticDispatcher(Group((0, 1), 0, None), EXPERTS)
    case = Case((3,))
    with pytest.raises(UserError, match="set the router's capacity"):
        dispatcher.dispatch(case.tokens(), routing(case.choices(), case.weights()))
