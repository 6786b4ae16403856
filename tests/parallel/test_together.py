"""Ranks take batches together, or stop together."""

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


def test_one_process_needs_nobody() -> None:
    assert list(together([1, 2], Mesh())) == [1, 2]
    with pytest.raises(StopIteration):
        next(together([], Mesh()))
