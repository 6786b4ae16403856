"""Both grids, from their definition; no process takes part."""

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expertmesh.errors import UserError
from expertmesh.parallel.grid import AXES, DENSE_AXES, EXPERT_AXES, Grid

DEGREE = st.sampled_from([1, 2, 3, 4])


@st.composite
def degrees(draw: st.DrawFn) -> dict[str, int]:
    """Seven degrees that fit together."""
    pp, dp, cp, tp, ep, etp = (draw(DEGREE) for _ in range(6))
    stage = dp * cp * tp
    assume(stage % (ep * etp) == 0)
    edp = stage // (ep * etp)
    return {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "edp": edp, "ep": ep, "etp": etp}


def world_of(given: dict[str, int]) -> int:
    return math.prod(given[axis] for axis in DENSE_AXES)


@given(degrees(), st.sampled_from(["inside", "outside"]), st.booleans())
@settings(deadline=None, max_examples=100)
def test_every_axis_divides_the_same_ranks(given: Any, placement: Any, infer: bool) -> None:
    world = world_of(given)
    asked = given | ({"dp": -1, "edp": -1} if infer else {})
    grid = Grid.infer(world, **asked, placement=placement)
    assert grid.degrees == given
    assert grid.world == world
    assert grid.stage_size * given["pp"] == world
    for axis in AXES:
        groups = grid.groups(axis)
        assert {len(group) for group in groups} == {given[axis]}
        assert sorted(rank for group in groups for rank in group) == list(range(world))
    for rank in range(world):
        places = grid.coordinates(rank)
        assert grid.dense[tuple(places[axis] for axis in DENSE_AXES)] == rank
        assert grid.expert[tuple(places[axis] for axis in EXPERT_AXES)] == rank
        # A stage is the same ranks to both grids.
        assert sorted(grid.group_of(rank, ("dp", "cp", "tp"))) == sorted(
            grid.group_of(rank, ("edp", "ep", "etp"))
        )
        for axis in AXES:
            group = grid.group_of(rank, axis)
            assert group.index(rank) == places[axis]


@given(degrees(), st.sampled_from(["inside", "outside"]))
@settings(deadline=None, max_examples=50)
def test_joined_groups_are_in_the_axes_order_and_ascending(given: Any, placement: Any) -> None:
    grid = Grid.infer(world_of(given), **given, placement=placement)
    for axes in (("dp", "cp"), ("cp", "tp"), ("dp", "cp", "tp"), ("ep", "etp"), DENSE_AXES):
        for group in grid.groups(axes):
            assert group == sorted(group)  # as torch sorts them, too
            places = [tuple(grid.coordinates(rank)[axis] for axis in axes) for rank in group]
            assert places == sorted(places)
            assert len(set(places)) == len(places) == math.prod(given[axis] for axis in axes)


@given(degrees(), st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_ranks_may_begin_anywhere(given: Any, first: int) -> None:
    world = world_of(given)
    ranks = [first + 2 * rank for rank in range(world)]
    grid, plain = Grid.infer(world, **given, ranks=ranks), Grid.infer(world, **given)
    for axis in AXES:
        expected = [[ranks[rank] for rank in group] for group in plain.groups(axis)]
        assert grid.groups(axis) == expected


def test_the_groups_of_four_ranks() -> None:
    grid = Grid.infer(4, ep=2)
    assert grid.groups("ep") == [[0, 1], [2, 3]]
    assert grid.groups("edp") == [[0, 2], [1, 3]]
    outside = Grid.infer(4, ep=2, placement="outside")
    assert outside.groups("ep") == [[0, 2], [1, 3]]
    assert outside.groups("edp") == [[0, 1], [2, 3]]


def test_outside_keeps_slices_of_an_expert_and_its_copies_beside_each_other() -> None:
    grid = Grid.infer(8, ep=2, edp=2, etp=2, placement="outside")
    assert sorted(grid.groups("etp")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert sorted(grid.groups("edp")) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert sorted(grid.groups("ep")) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_both_grids_are_described_with_the_ranks_of_each_group() -> None:
    assert Grid.infer(8, pp=2, tp=2, ep=2, placement="outside").describe() == (
        "dense  pp=2 x dp=2 x cp=1 x tp=2\n"
        "  pp   {0,4} {1,5} {2,6} {3,7}\n"
        "  dp   {0,2} {1,3} {4,6} {5,7}\n"
        "  tp   {0,1} {2,3} {4,5} {6,7}\n"
        "expert pp=2 x edp=2 x ep=2 x etp=1\n"
        "  edp  {0,1} {2,3} {4,5} {6,7}\n"
        "  ep   {0,2} {1,3} {4,6} {5,7}"
    )


def test_many_groups_are_counted_and_not_all_listed() -> None:
    assert "ep   {0,1} {2,3} {4,5} {6,7} {8,9} {10,11} {12,13} {14,15} and 24 more" in (
        Grid.infer(64, ep=2).describe()
    )


@pytest.mark.parametrize(
    ("world", "asked", "message"),
    [
        (4, {"ep": 3}, r"ep=3 \* etp=1 does not divide the 4 ranks of a pipeline stage "
         r"\(4 ranks, pp=1\); set ep = [24], or start a multiple of 3 ranks"),
        (1, {"ep": 4}, r"ep=4 .* set ep = 1, or start a multiple of 4 ranks"),
        (6, {"pp": 4}, r"pp=4 does not divide 6 ranks; set pp = 3, or start a multiple of 4"),
        (8, {"cp": 2, "tp": 3}, r"cp=2 \* tp=3 .* set tp = [24], or start a multiple of 6 ranks"),
        (8, {"dp": 3}, r"dp=3 \* cp=1 \* tp=1 is 3, but a pipeline stage has 8 ranks "
         r"\(8 ranks, pp=1\); set dp = 8, or -1"),
        (8, {"pp": 2, "edp": 4, "ep": 2}, r"edp=4 \* ep=2 \* etp=1 is 8, but a pipeline stage has "
         r"4 ranks \(8 ranks, pp=2\); set edp = 2, or -1"),
        (9, {"cp": 2, "tp": 4}, r"cp=2 \* tp=4 does not divide .*; their product must divide 9"),
        (4, {"tp": 0}, r"tp must be at least 1, got 0; set tp = 1"),
        (4, {"ep": -1}, r"ep must be at least 1, got -1"),
        (4, {"dp": -2}, r"dp must be at least 1, or -1 for what is left, got -2"),
        (4, {"ep": 2.0}, r"ep must be a whole number, got 2\.0 of type float; set ep = 1"),
        (4, {"ep": "2"}, r"ep must be a whole number, got '2' of type str"),
        (4, {"tp": True}, r"tp must be a whole number, got True of type bool"),
        (4, {"placement": "near"}, r"placement must be 'inside' or 'outside', got 'near'"),
        (4, {"ranks": [0, 1, 1, 2]}, r"ranks must be 4 different numbers, got \[0, 1, 1, 2\]"),
        (4, {"ranks": [0, 1]}, r"ranks must be 4 different numbers, got \[0, 1\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_what_would(
    world: int, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Grid.infer(world, **asked)


@given(st.integers(1, 24), degrees())
@settings(deadline=None, max_examples=100)
def test_an_error_advises_a_degree_that_works(world: int, given: Any) -> None:
    asked: dict[str, Any] = given | {"dp": -1, "edp": -1}
    for _ in range(8):
        try:
            Grid.infer(world, **asked)
            return
        except UserError as error:
            text = str(error)
            if "their product must divide" in text:
                return
            axis, degree = text.split("set ")[1].split(",")[0].split(" = ")
            assert asked[axis] != int(degree)
            asked[axis] = int(degree)
    pytest.fail(f"followed the advice and still got: {text}")


def test_axes_of_both_grids_form_no_group() -> None:
    with pytest.raises(UserError, match=r"got dp, ep"):
        Grid.infer(4, ep=2).groups(("dp", "ep"))


def test_experts_are_dealt_out_evenly_or_not_at_all() -> None:
    Grid.infer(8, ep=4).check_experts(12)
    with pytest.raises(UserError, match=r"ep=4 for 6 experts; set ep to one of \[1, 2\]"):
        Grid.infer(8, ep=4).check_experts(6)
    with pytest.raises(UserError, match=r"ep=8 for 4 experts; set ep to one of \[1, 2, 4\]; .*etp"):
        Grid.infer(8, ep=8).check_experts(4)
