"""Which rank writes what in which turn, and who sends it: the same answer on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from expertmesh.convert.layout import Layout, Piece
from expertmesh.convert.slabs import slabs
from expertmesh.convert.source import Stored
from expertmesh.parallel.checkpoint.box import Box


class Holding(NamedTuple):
    """What a rank has of a parameter."""

    dtype: torch.dtype
    box: Box


class Step(NamedTuple):
    """What one rank writes in one turn.

    Attributes:
        file: Into which file.
        name: Of which tensor.
        slab: Which part.
        last: Whether it is the tensor's last.
    """

    file: str
    name: str
    slab: Box
    last: bool


class Part(NamedTuple):
    """What one rank sends of a slab.

    Attributes:
        holder: The rank's place in the group.
        piece: Where parameter and file tensor meet.
        box: Which elements, in the parameter.
    """

    holder: int
    piece: Piece
    box: Box


@dataclass(frozen=True)
class Turns:
    """The plan of a save.

    Attributes:
        layout: Names and shapes in the files.
        tensors: Dtype and shape of every file tensor.
        files: Names of file tensors by file, in order.
        holders: For every parameter boxes that make it up, and a rank that has each.
        num_ranks: Ranks that write.
        slab_bytes: What a rank writes in one turn, at most.
    """

    layout: Layout
    tensors: Mapping[str, Stored]
    files: Mapping[str, Sequence[str]]
    holders: Mapping[str, Sequence[tuple[Box, int]]]
    num_ranks: int
    slab_bytes: int

    def steps(self, rank: int) -> Iterator[Step]:
        """What a rank writes, turn by turn."""
        for file in list(self.files)[rank :: self.num_ranks]:
            for name in self.files[file]:
                stored = self.tensors[name]
                whole = Box.whole(stored.shape)
                for slab in slabs(whole, stored.dtype.itemsize, self.slab_bytes):
                    yield Step(file, name, slab, slab.stop == whole.stop)

    def of_file(self, file: str) -> dict[str, Stored]:
        """What goes into a file, in order."""
        return {name: self.tensors[name] for name in self.files[file]}

    def parts(self, step: Step) -> list[Part]:
        """What ranks send for a step, by rank."""
        parts = []
        for piece in self.layout.of_theirs[step.name]:
            if (in_slab := piece.their_box.overlap(step.slab)) is None:
                continue
            wanted = piece.to_ours(in_slab)
            for box, holder in self.holders[piece.ours]:
                if (common := box.overlap(wanted)) is not None:
                    parts.append(Part(holder, piece, common))
        return sorted(parts, key=lambda part: part.holder)


def choose_holders(
    holdings: Sequence[Mapping[str, Holding]],
) -> dict[str, list[tuple[Box, int]]]:
    """For every box of every parameter one of the ranks that have it, each in its turn."""
    ranks: dict[str, dict[Box, list[int]]] = {}
    for rank, holding in enumerate(holdings):
        for name, (_, box) in holding.items():
            if box.num_elements:
                ranks.setdefault(name, {}).setdefault(box, []).append(rank)
    return {
        name: [(box, some[number % len(some)]) for box, some in sorted(boxes.items())]
        for number, (name, boxes) in enumerate(sorted(ranks.items()))
    }
