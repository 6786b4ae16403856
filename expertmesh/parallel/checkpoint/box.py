"""Boxes: contiguous parts of a tensor, and the one that this rank holds."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.shards import Shard, is_sharded, shard_of


@dataclass(frozen=True, order=True)
class Box:
    """Elements ``start <= index < stop`` along every dim of some tensor.

    Attributes:
        start: First index by dim.
        stop: The index after the last, by dim.
    """

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> "Box":
        """All of a tensor of this shape."""
        return Box((0,) * len(shape), tuple(shape))

    @staticmethod
    def of(shard: Shard) -> "Box":
        """Where a shard lies in its tensor."""
        stop = (begin + size for begin, size in zip(shard.offset, shard.local.shape, strict=True))
        return Box(tuple(shard.offset), tuple(stop))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths by dim."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def num_elements(self) -> int:
        """Elements in it; 1 for the box of a scalar."""
        return math.prod(self.shape)

    def overlap(self, other: "Box") -> "Box | None":
        """What both have in common; None where that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        empty = any(begin >= end for begin, end in zip(start, stop, strict=True))
        return None if empty else Box(start, stop)

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """This box as slices of the tensor that holds ``outer``."""
        ends = zip(self.start, self.stop, outer.start, strict=True)
        return tuple(slice(start - origin, stop - origin) for start, stop, origin in ends)

    def __str__(self) -> str:
        return "[" + ",".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


def held(name: str, tensor: Tensor) -> Shard:
    """The box of a tensor that this rank holds.

    Args:
        name: For the message.
        tensor: Plain, or a ``DTensor`` that is replicated or sharded, in FSDP2's way too.

    Raises:
        UserError: If this rank's part is no box: a sum that is not carried out yet, or strides
            that no later axis closes.
    """
    if is_sharded(tensor):
        _check_is_box(name, tensor)
    return shard_of(tensor)


def _check_is_box(name: str, tensor: Any) -> None:
    placements, sizes = tensor.placements, tensor.device_mesh.shape
    for axis, placement in enumerate(placements):
        if placement.is_partial():
            raise UserError(
                f"{name} is {placement!r} over a mesh axis and cannot be saved or loaded; "
                "redistribute it to Replicate() first"
            )
        # FSDP2 marks the outer axis of a dim that inner axes had cut before it: as many pieces as
        # the inner axes make. Only together are they contiguous.
        strides = getattr(placement, "split_factor", 1)
        inner = math.prod(
            sizes[other]
            for other in range(axis + 1, len(placements))
            if getattr(placements[other], "dim", None) == getattr(placement, "dim", None)
        )
        if strides not in (1, inner):
            raise UserError(
                f"{name} is {placement!r} over a mesh axis, with strides that no inner axis "
                "closes; redistribute it to Shard() first"
            )
