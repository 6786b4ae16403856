import math

import pytest

from expertmesh.errors import UserError
from expertmesh.parallel.grid import Grid
from expertmesh.parallel.strategies import STRATEGIES, Strategy, copies_beside_each_other, strategy


@pytest.mark.parametrize("world", [2, 4, 6, 8, 32])
@pytest.mark.parametrize("num_experts", [3, 4, 16, 128])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_a_mesh_that_fits(name: str, world: int, num_experts: int) -> None:
    chosen = strategy(name, world, num_experts)
    grid = Grid.infer(world, pp=chosen.pp, ep=chosen.ep, placement=chosen.placement)
    grid.check_experts(num_experts)
    assert chosen.ep == math.gcd(
        {"ep": world, "ep_zero": world // 2, "hybrid": world // 2}[name], num_experts
    )


def test_what_each_is() -> None:
    assert strategy("ep", 8, 16) == Strategy(ep=8, zero=2, expert_zero=2)
    assert strategy("hybrid", 8, 16) == Strategy(pp=2, ep=4, zero=1, expert_zero=1)
    beside = strategy("ep_zero", 8, 16)
    assert beside == Strategy(ep=4, placement="outside", zero=1, expert_zero=1)
    # The two copies of an expert are neighbours; only the all-to-all leaves a pair.
    assert Grid.infer(8, ep=4, placement="outside").groups("edp") == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


def test_more_copies_beside_each_other() -> None:
    chosen = copies_beside_each_other(8, 16, copies=4)
    grid = Grid.infer(8, ep=chosen.ep, placement=chosen.placement)
    assert grid.groups("edp") == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("name", "world", "message"),
    [
        ("ep_zer", 8, r"one of ep, ep_zero, hybrid, got 'ep_zer'.*ep_zero"),
        ("ep_zero", 3, r"ep_zero needs a multiple of 2 ranks, got 3; set mesh.ep yourself"),
        ("hybrid", 5, r"hybrid needs an even number of ranks, got 5; set mesh.pp yourself"),
    ],
)
def test_refusals(name: str, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        strategy(name, world, 16)


def test_copies_that_do_not_divide_the_ranks_are_named() -> None:
    with pytest.raises(UserError, match="multiple of 4 ranks, got 6"):
        copies_beside_each_other(6, 16, copies=4)
