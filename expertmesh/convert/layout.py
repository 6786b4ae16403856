"""How the parameters of a decoder lie in files under other names.

A parameter and a tensor in a file share boxes of elements: one file tensor may hold parts of
several parameters side by side, one parameter may be spread over many file tensors, and dims may
stand in another order. All that is a list of ``Piece``, from which reading, writing and checking
follow, also of boxes smaller than a piece: so a rank can fill the part of a tensor that it holds.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from expertmesh.parallel.checkpoint.box import Box


@dataclass(frozen=True)
class Piece:
    """A box of one of our parameters, and where it stands in a tensor of a file.

    Attributes:
        ours: The parameter's name.
        box: The elements meant, in the parameter.
        theirs: The file tensor's name.
        start: Where the box begins in it.
        dims: For each dim of the file tensor, the parameter's dim that runs along it. The
            parameter's dims that are not named have length 1 in ``box``.
    """

    ours: str
    box: Box
    theirs: str
    start: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def their_box(self) -> Box:
        """The elements meant, in the file tensor."""
        return self.to_theirs(self.box)

    def to_theirs(self, part: Box) -> Box:
        """Where a part of ``box`` stands in the file tensor."""
        shape = part.shape
        starts = tuple(
            origin + part.start[dim] - self.box.start[dim]
            for origin, dim in zip(self.start, self.dims, strict=True)
        )
        stops = (start + shape[dim] for start, dim in zip(starts, self.dims, strict=True))
        return Box(starts, tuple(stops))

    def to_ours(self, part: Box) -> Box:
        """Where a part of ``their_box`` stands in the parameter."""
        starts, stops = list(self.box.start), list(self.box.stop)
        for along, dim in enumerate(self.dims):
            starts[dim] = self.box.start[dim] + part.start[along] - self.start[along]
            stops[dim] = starts[dim] + part.stop[along] - part.start[along]
        return Box(tuple(starts), tuple(stops))

    def as_ours(self, values: Tensor, part: Box) -> Tensor:
        """Values of the file tensor in the parameter's order of dims; a view.

        Args:
            values: Of the elements ``to_theirs(part)``.
            part: In the parameter; what is returned has its shape.
        """
        order = sorted(range(len(self.dims)), key=lambda along: self.dims[along])
        return values.permute(order).reshape(part.shape)

    def as_theirs(self, values: Tensor) -> Tensor:
        """Values of a part of ``box`` in the file tensor's order of dims; a view."""
        kept = sorted(self.dims)
        left_out = [dim for dim in range(values.dim()) if dim not in kept]
        return values.squeeze(left_out).permute([kept.index(dim) for dim in self.dims])


class Layout:
    """All pieces of a model in one kind of file.

    Args:
        pieces: Boxes of one parameter do not overlap, and neither do those of a file tensor;
            together they are all of it.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = tuple(pieces)

    @cached_property
    def of_ours(self) -> Mapping[str, tuple[Piece, ...]]:
        """The pieces of each parameter."""
        return _grouped(self.pieces, lambda piece: piece.ours)

    @cached_property
    def of_theirs(self) -> Mapping[str, tuple[Piece, ...]]:
        """The pieces of each file tensor."""
        return _grouped(self.pieces, lambda piece: piece.theirs)

    @cached_property
    def our_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        return {name: _extent(p.box for p in pieces) for name, pieces in self.of_ours.items()}

    @cached_property
    def their_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the file tensors."""
        return {
            name: _extent(p.their_box for p in pieces) for name, pieces in self.of_theirs.items()
        }

    @property
    def num_elements(self) -> int:
        """Elements of all tensors together."""
        return sum(map(math.prod, self.their_shapes.values()))


def as_ours(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of files that hold the parameters themselves, under their own names."""
    return Layout(
        Piece(name, Box.whole(shape), name, (0,) * len(shape), tuple(range(len(shape))))
        for name, shape in shapes.items()
    )


def _grouped(
    pieces: Iterable[Piece], name_of: Callable[[Piece], str]
) -> dict[str, tuple[Piece, ...]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(name_of(piece), []).append(piece)
    return {name: tuple(group) for name, group in groups.items()}


def _extent(boxes: Iterable[Box]) -> tuple[int, ...]:
    return tuple(map(max, zip(*(box.stop for box in boxes), strict=True)))
