"""Batches on every rank, or the same error on every rank."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.mesh import Mesh

T = TypeVar("T")


def together(batches: Iterable[T], mesh: Mesh) -> Iterator[T]:
    """Yield each rank's batches while every rank has one.

    A rank whose data ends before the others', or fails, would leave them waiting in the next
    collective. Here all ranks learn of it before anything is computed. Ends quietly where all end
    together.

    Args:
        batches: This rank's.
        mesh: All ranks that train together.

    Raises:
        UserError: On every rank, naming those whose data ended first, or could not be read.
        RuntimeError: As ``Agreement.together``, if it failed in any other way.

    Example:
        >>> for batch in together(loader, mesh):
        ...     model(batch).backward()
    """
    ranks = Agreement(mesh.everyone)
    with ranks.together():
        iterator = iter(batches)
    for number in itertools.count():
        with ranks.together():
            taken = list(itertools.islice(iterator, 1))
        answers = ranks.gather(not taken)
        if all(answers):
            return
        if any(answers):
            first = [rank for rank, e in zip(mesh.everyone.ranks, answers, strict=True) if e]
            raise UserError(
                f"the data of rank {', '.join(map(str, first))} ended after {number} batches, and "
                "the other ranks have more; give every rank as many, or let the data repeat"
            )
        yield from taken
