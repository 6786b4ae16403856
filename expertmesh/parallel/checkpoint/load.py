"""Saved tensors into those of a model that is cut in another way."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box, held
from expertmesh.parallel.checkpoint.files import DTYPES
from expertmesh.parallel.checkpoint.index import Entry, key

# Pages that were read stay in memory while their file is mapped. Opening it again reads its header.
MAPPED_BYTES = 256 * 2**20


class _Copy(NamedTuple):
    """One overlap of a saved box and one that is held here."""

    key: str
    saved: Box
    dtype: torch.dtype
    overlap: Box
    destination: Tensor


def load_tensors(folder: Path, entries: Mapping[str, Entry], tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, each rank its own part, from the saved boxes that overlap it.

    Files are mapped one at a time, and again after every ``MAPPED_BYTES``, so that beside the
    tensors themselves the host holds little. Waits for no other rank.

    Args:
        folder: Where the files are.
        entries: As ``read_index`` gave them.
        tensors: Written in place; every one has an entry of its shape and dtype.

    Raises:
        UserError: If a file is missing, or holds something else than its index says.
    """
    copies: dict[str, list[_Copy]] = {}
    for name, tensor in tensors.items():
        entry, shard = entries[name], held(name, tensor)
        own = Box.of(shard)
        for file, box in entry.boxes:
            if (overlap := box.overlap(own)) is not None:
                destination = shard.local[overlap.within(own)]
                copy = _Copy(key(name, box, entry.shape), box, entry.dtype, overlap, destination)
                copies.setdefault(file, []).append(copy)
    for file, wanted in sorted(copies.items()):
        _read(folder / file, wanted)


def _read(file: Path, copies: list[_Copy]) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing; it holds {copies[0].key}")
    try:
        for some in _in_turns(copies):
            with safe_open(file, framework="pt") as saved, torch.no_grad():
                for copy in some:
                    copy.destination.copy_(_overlap(file, saved, copy))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _in_turns(copies: list[_Copy]) -> Iterator[list[_Copy]]:
    """The same copies, in lists that each read about ``MAPPED_BYTES``."""
    some: list[_Copy] = []
    num_bytes = 0
    for copy in copies:
        some.append(copy)
        num_bytes += copy.overlap.num_elements * copy.dtype.itemsize
        if num_bytes >= MAPPED_BYTES:
            yield some
            some, num_bytes = [], 0
    if some:
        yield some


def _overlap(file: Path, saved: Any, copy: _Copy) -> Tensor:
    part = saved.get_slice(copy.key)
    shape, dtype = tuple(part.get_shape()), DTYPES.get(part.get_dtype())
    if (shape, dtype) != (copy.saved.shape, copy.dtype):
        raise UserError(
            f"{file}: {copy.key} should be {copy.dtype} {copy.saved.shape}, is {dtype} {shape}"
        )
    # A scalar cannot be sliced.
    if copy.overlap == copy.saved:
        return saved.get_tensor(copy.key)
    return part[copy.overlap.within(copy.saved)]
