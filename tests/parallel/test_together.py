"""Ranks take batches together, or stop together."""

from collections.abc import Iterator

import pytest

from expertmesh.errors import UserError
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.together import together
from expertmesh.testing import run_on_ranks


def take(lengths: list[int]) -> tuple[list[int], str]:
    mesh = Mesh()
    taken: list[int] = []
    try:
        for batch in together(range(lengths[mesh.rank]), mesh):
            taken.append(batch)
    except UserError as error:
        return taken, str(error)
    return taken, ""


def test_equal_lengths_end_quietly() -> None:
    assert run_on_ranks(2, take, [3, 3]) == [([0, 1, 2], "")] * 2


def test_a_rank_that_ends_first_is_named_on_every_rank() -> None:
    for taken, error in run_on_ranks(3, take, [2, 5, 2]):
        assert taken == [0, 1]
        assert error.startswith("the data of rank 0, 2 ended after 2 batches")


def unreadable(rank: int, at_once: bool) -> str:
    """What each rank hears of one whose data cannot be read."""
    mesh = Mesh()
    batches = Torn(at_once) if mesh.rank == rank else range(9)
    taken: list[int] = []
    with pytest.raises(UserError) as caught:
        taken.extend(together(batches, mesh))
    return f"{taken} {caught.value}"


class Torn:
    """Breaks when it is opened, or after two batches."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once

    def __iter__(self) -> Iterator[int]:
        if self.at_once:
            raise OSError(5, "Input/output error", "shard-7")
        return self._read()

    def _read(self) -> Iterator[int]:
        yield from (0, 1)
        raise OSError(5, "Input/output error", "shard-7")


@pytest.mark.parametrize(("at_once", "taken"), [(False, [0, 1]), (True, [])])
def test_data_that_cannot_be_read_are_an_error_on_every_rank(
    at_once: bool, taken: list[int]
) -> None:
    answers = run_on_ranks(2, unreadable, 1, at_once, timeout=30)
    assert answers == [f"{taken} rank 1: shard-7: Input/output error"] * 2


def test_one_process_needs_nobody() -> None:
    assert list(together([1, 2], Mesh())) == [1, 2]
    with pytest.raises(StopIteration):
        next(together([], Mesh()))
