"""Who writes which part of the tensors that ranks hold together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint.box import Box, held
from expertmesh.parallel.checkpoint.files import Written, write_tensors
from expertmesh.parallel.checkpoint.index import (
    Entry,
    check_covered,
    key,
    numbered_file,
    single_file,
    write_index,
)
from expertmesh.shards import Shard


class _Held(NamedTuple):
    """What a rank tells the others about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box


@dataclass(frozen=True)
class Part:
    """What this rank writes of some tensors.

    Attributes:
        stem: What the tensors are saved as.
        file: The file of this rank.
        tensors: What goes into it; parts of the originals, which show what is written into those
            until ``on_host``.
        entries: Every rank's tensors and where they go; None where one file holds them whole.
    """

    stem: str
    file: str
    tensors: Mapping[str, Tensor]
    entries: Mapping[str, Entry] | None

    def on_host(self) -> "Part":
        """The same with copies of the tensors in host memory, that nobody else writes to."""
        copies = {
            name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=copies)

    def write(self, folder: Path) -> Written:
        """Write this rank's file. Waits for no other rank."""
        return write_tensors(folder / self.file, self.tensors)

    def write_index(self, folder: Path) -> list[Written]:
        """Write what describes all ranks' files; for one rank to do."""
        return [] if self.entries is None else [write_index(folder, self.stem, self.entries)]


def plan(tensors: Mapping[str, Tensor], stem: str, ranks: Agreement) -> Part:
    """Decide together who writes what: each box once, and every rank about as much.

    Args:
        tensors: What this rank holds, by names that mean the same everywhere: plain tensors, whose
            values are the same on every rank that has them, and ``DTensor``s. Ranks need not hold
            the same names.
        stem: What they are saved as.
        ranks: Those that hold them.

    Returns:
        This rank's part.

    Raises:
        UserError: On every rank, if a tensor has different shapes or dtypes on different ranks, if
            no rank holds some of its elements, or if a part is no box.
    """
    shards = {}
    with ranks.together():
        shards = {name: held(name, tensor) for name, tensor in tensors.items()}
    if ranks.size == 1:
        for name, shard in shards.items():
            _check_whole(name, shard)
        whole = {name: shard.local for name, shard in shards.items()}
        return Part(stem, single_file(stem), whole, None)
    holdings = ranks.gather(
        {
            name: _Held(shard.local.dtype, shard.shape, Box.of(shard))
            for name, shard in shards.items()
        }
    )
    writers = _writers(holdings)
    entries = _entries(holdings, writers, stem)
    own = {
        key(name, box, shards[name].shape): shards[name].local
        for (name, box), writer in writers.items()
        if writer == ranks.index
    }
    return Part(stem, numbered_file(stem, ranks.index, ranks.size), own, entries)


def _check_whole(name: str, shard: Shard) -> None:
    if tuple(shard.local.shape) != shard.shape:
        raise UserError(
            f"{name} has shape {shard.shape}, and this process, which saves alone, holds only "
            f"{tuple(shard.local.shape)} of it; let all ranks that hold it save together, with "
            "group=mesh.everyone"
        )


def _writers(holdings: list[dict[str, _Held]]) -> dict[tuple[str, Box], int]:
    """The rank that writes each box; the same answer everywhere."""
    holders: dict[tuple[str, Box], list[int]] = {}
    for rank, holding in enumerate(holdings):
        for name, (_, _, box) in holding.items():
            if box.num_elements:
                holders.setdefault((name, box), []).append(rank)

    def num_bytes(part: tuple[str, Box]) -> int:
        name, box = part
        return box.num_elements * holdings[holders[part][0]][name].dtype.itemsize

    # What only one rank can write comes first, then the largest.
    order = sorted(holders, key=lambda part: (len(holders[part]) > 1, -num_bytes(part), part))
    load = [0] * len(holdings)
    writers = {}
    for part in order:
        writer = min(holders[part], key=lambda rank: (load[rank], rank))
        writers[part] = writer
        load[writer] += num_bytes(part)
    return writers


def _entries(
    holdings: list[dict[str, _Held]], writers: Mapping[tuple[str, Box], int], stem: str
) -> dict[str, Entry]:
    kinds: dict[str, _Held] = {}
    for rank, holding in enumerate(holdings):
        for name, own in holding.items():
            other = kinds.setdefault(name, own)
            if (own.dtype, own.shape) != (other.dtype, other.shape):
                raise UserError(
                    f"{name} is {own.dtype} {own.shape} on rank {rank} of the group and "
                    f"{other.dtype} {other.shape} on one before it; one name must mean one tensor"
                )
    boxes: dict[str, list[tuple[str, Box]]] = {name: [] for name in kinds}
    for (name, box), writer in sorted(writers.items()):
        boxes[name].append((numbered_file(stem, writer, len(holdings)), box))
    entries = {
        name: Entry(kind.dtype, kind.shape, tuple(boxes[name])) for name, kind in kinds.items()
    }
    for name, entry in entries.items():
        check_covered(name, entry, "the ranks do not hold every part of a tensor")
    return entries
