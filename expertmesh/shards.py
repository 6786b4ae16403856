"""Which part of a logical tensor this rank holds.

A parameter is a plain tensor, or a ``DTensor`` of which this process holds one box. Code that
computes with parameters asks here and need not know which.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's box of a logical tensor.

    Attributes:
        local: The values held here; a view of the tensor's own storage.
        shape: The logical tensor's shape.
        offset: Where the box begins in it, along every dim.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a ``DTensor``."""
    # Nobody can have made one without this module; asking costs no import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _as_dtensor(tensor: Tensor) -> Any:
    """The same; its class is not imported for the type checker's sake."""
    return tensor


def local(tensor: Tensor) -> Tensor:
    """The values that this rank holds, differentiably; a plain tensor is returned as it is.

    The gradient of what is returned must be the whole gradient of this box on this rank's data: a
    tensor that is replicated over an axis gets, from each rank of the axis, its whole gradient.
    """
    return _as_dtensor(tensor).to_local() if is_sharded(tensor) else tensor


def shard_of(tensor: Tensor) -> Shard:
    """The box that this rank holds, for reading and writing in place."""
    if not is_sharded(tensor):
        return Shard(tensor.detach(), tuple(tensor.shape), (0,) * tensor.dim())
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = _as_dtensor(tensor)
    shape, offset = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    box = sharded.to_local().detach()
    if tuple(box.shape) != tuple(shape):
        raise RuntimeError(f"a box of shape {tuple(box.shape)} was computed to be {tuple(shape)}")
    return Shard(box, tuple(tensor.shape), tuple(offset))


def global_index(shard: Shard, start: int, stop: int) -> Tensor:
    """Flat indices, in the logical tensor, of rows ``start`` to ``stop`` of the box's first dim.

    Args:
        shard: The box; at least one dim.
        start: First row, counted within the box.
        stop: The row after the last.

    Returns:
        int64, of the rows' shape.
    """
    device = shard.local.device
    index = torch.zeros((), dtype=torch.int64, device=device)
    sizes = (stop - start, *shard.local.shape[1:])
    begins = (shard.offset[0] + start, *shard.offset[1:])
    for size, begin, whole in zip(sizes, begins, shard.shape, strict=True):
        along = torch.arange(begin, begin + size, device=device)
        index = index.unsqueeze(-1) * whole + along
    return index
