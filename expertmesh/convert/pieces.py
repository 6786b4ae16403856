"""The pieces that published models are made of: matrices, side by side or not, and experts."""

from collections.abc import Iterator, Sequence

from expertmesh.convert.layout import Piece
from expertmesh.parallel.checkpoint.box import Box


def in_a_row(
    ours: Sequence[str], shape: tuple[int, ...], theirs: str, *, turned: bool = False
) -> Iterator[Piece]:
    """Parameters of one shape that follow one another along the first dim of a file tensor.

    Args:
        ours: Their names.
        shape: Of each.
        theirs: The file tensor's name.
        turned: The file tensor has its dims in the opposite order.
    """
    dims = tuple(range(len(shape)))
    if turned:
        dims = dims[::-1]
    for number, name in enumerate(ours):
        begin = (number * shape[0], *([0] * (len(shape) - 1)))
        yield Piece(name, Box.whole(shape), theirs, tuple(begin[dim] for dim in dims), dims)


def experts_stacked(
    ours: str,
    shape: tuple[int, int, int],
    parts: Sequence[int] | None,
    theirs: str,
    *,
    turned: bool = False,
) -> Iterator[Piece]:
    """Matrices of all experts in one file tensor.

    Args:
        ours: A parameter of shape ``(E, out, in)``, or ``(E, parts, out, in)``.
        shape: ``(E, out, in)``.
        parts: Places in the parameter's second dim, of what follows one another along the file
            tensor's out dim; None where the parameter has no such dim.
        theirs: The file tensor, ``(E, parts * out, in)``.
        turned: It is ``(E, in, parts * out)``.
    """
    for number, (box, out_dim) in enumerate(_parts(0, shape[0], shape[1:], parts)):
        begin, dims = (0, number * shape[1], 0), (0, out_dim, out_dim + 1)
        if turned:
            begin, dims = (0, 0, number * shape[1]), (0, out_dim + 1, out_dim)
        yield Piece(ours, box, theirs, begin, dims)


def experts_apart(
    ours: str, shape: tuple[int, int, int], parts: Sequence[int] | None, theirs: str
) -> Iterator[Piece]:
    """Matrices of all experts, each expert's in a file tensor ``(parts * out, in)`` of its own.

    Args:
        ours: As for ``experts_stacked``.
        shape: Likewise.
        parts: Likewise.
        theirs: The file tensors' names, with the expert's number at ``{expert}``.
    """
    for expert in range(shape[0]):
        name = theirs.format(expert=expert)
        for number, (box, out_dim) in enumerate(_parts(expert, expert + 1, shape[1:], parts)):
            yield Piece(ours, box, name, (number * shape[1], 0), (out_dim, out_dim + 1))


def _parts(
    first: int, end: int, matrix: tuple[int, int], parts: Sequence[int] | None
) -> Iterator[tuple[Box, int]]:
    """Boxes of some experts' parts, and which dim is ``out``."""
    if parts is None:
        yield Box((first, 0, 0), (end, *matrix)), 1
        return
    for part in parts:
        yield Box((first, part, 0, 0), (end, part + 1, *matrix)), 2
