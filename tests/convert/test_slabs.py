"""Boxes cut into parts."""

import pytest
import torch

from expertmesh.convert.slabs import slabs
from expertmesh.parallel.checkpoint.box import Box


@pytest.mark.parametrize(
    ("start", "stop"),
    [((0,), (17,)), ((2, 1), (7, 4)), ((1, 0, 2), (4, 5, 9)), ((0, 3, 0, 1), (2, 4, 5, 4))],
)
@pytest.mark.parametrize("most_bytes", [1, 4, 13, 48, 10_000])
def test_parts_follow_one_another_and_are_short(
    start: tuple[int, ...], stop: tuple[int, ...], most_bytes: int
) -> None:
    box = Box(start, stop)
    whole = torch.arange(10**4).view(*[10] * (len(start) - 1), -1)
    outer = Box.whole(tuple(whole.shape))
    parts = list(slabs(box, 4, most_bytes))
    found = torch.cat([whole[part.within(outer)].reshape(-1) for part in parts])
    assert torch.equal(found, whole[box.within(outer)].reshape(-1))
    assert all(part.num_elements * 4 <= max(4, most_bytes) for part in parts)


def test_nothing_of_an_empty_box_and_all_of_a_scalar() -> None:
    assert list(slabs(Box((0, 2), (3, 2)), 4)) == []
    assert list(slabs(Box((), ()), 4)) == [Box((), ())]


def test_a_box_that_fits_stays_whole() -> None:
    box = Box((1, 2), (3, 8))
    assert list(slabs(box, 2, 24)) == [box]
