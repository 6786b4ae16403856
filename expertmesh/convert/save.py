"""A model on any mesh into files of another layout, without its ever being whole on a rank.

Every file has one rank that writes it, a slab at a time. The ranks go through their files in
turns: in each, a rank is sent what it is to write next by those that hold it.
"""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.convert import folder as folders
from expertmesh.convert.layout import Layout
from expertmesh.convert.load import check_names, parameters
from expertmesh.convert.source import Stored
from expertmesh.convert.turns import Holding, Part, Step, Turns, choose_holders
from expertmesh.dispatch.collectives import Group, exchange_rows
from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint.box import Box, held
from expertmesh.parallel.checkpoint.files import as_bytes


def save(
    model: nn.Module,
    final: Path,
    layout: Layout,
    *,
    config: Mapping[str, Any],
    group: Group | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = folders.SHARD_BYTES,
    slab_bytes: int,
    also: Sequence[Path] = (),
) -> None:
    """Write a model's values as a folder of safetensors.

    All ranks of ``group`` call it together, and share the disk.

    Args:
        model: Plain, or placed on a mesh.
        final: The folder; one that was written so before is replaced, once all is there.
        layout: Names and shapes in the files.
        config: What goes into ``config.json``.
        group: The ranks that hold the model together; None is this process alone.
        dtype: Of the files; None keeps each parameter's.
        shard_bytes: Of a file, at most, unless one tensor is larger.
        slab_bytes: What a rank writes in one turn, at most.
        also: Files to copy into the folder.

    Raises:
        UserError: On every rank, if the folder cannot be written; then nothing of it is left.
    """
    # Of a link the folder that it leads to, so that all is written on that disk.
    final = final.resolve()
    ranks = Agreement(group)
    saving = _Saving(model, layout, ranks, group, dtype, shard_bytes, slab_bytes)
    unfinished = folders.unfinished(final)
    try:
        with ranks.together():
            if ranks.first:
                folders.begin(final)
        everyones = ranks.gather(saving.write(unfinished))
        with ranks.together():
            if ranks.first:
                hashes = {name: value for own in everyones for name, value in own.items()}
                turns = saving.turns
                folders.describe(unfinished, turns.files, turns.tensors, hashes, config)
                folders.copy_into(unfinished, also)
                folders.finish(unfinished, final)
    except UserError as error:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"could not save the model in {final}: {error}") from error


class _Saving:
    """This rank's part of a save."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        ranks: Agreement,
        group: Group | None,
        dtype: torch.dtype | None,
        shard_bytes: int,
        slab_bytes: int,
    ) -> None:
        self._ranks = ranks
        self._group = None if ranks.size == 1 else group
        self._device = torch.device("cpu") if self._group is None else self._group.device
        self._own: dict[str, tuple[Tensor, Box]] = {}
        with ranks.together():
            for name, tensor in parameters(model).items():
                shard = held(name, tensor)
                self._own[name] = (shard.local, Box.of(shard))
        holdings = ranks.gather(
            {name: Holding(values.dtype, box) for name, (values, box) in self._own.items()}
        )
        with ranks.together():
            check_names(layout, {name for holding in holdings for name in holding})
        dtypes = {name: held.dtype for holding in holdings for name, held in holding.items()}
        tensors = {
            name: Stored(dtype or dtypes[layout.of_theirs[name][0].ours], shape)
            for name, shape in layout.their_shapes.items()
        }
        tensors = folders.aligned(tensors)
        files = folders.shards(tensors, shard_bytes)
        holders = choose_holders(holdings)
        self.turns = Turns(layout, tensors, files, holders, ranks.size, slab_bytes)

    def write(self, folder: Path) -> dict[str, str]:
        """Write this rank's files; returns the hashes of the tensors in them."""
        steps = [list(self.turns.steps(rank)) for rank in range(self._ranks.size)]
        files = _Files(folder, self.turns)
        for turn in range(max(map(len, steps))):
            now = [own[turn] if turn < len(own) else None for own in steps]
            values = self._exchange(now)
            if (step := now[self._ranks.index]) is not None:
                files.write(step, values)
        with self._ranks.together():
            files.close()
        return files.hashes

    def _exchange(self, steps: Sequence[Step | None]) -> Tensor:
        """Send every rank what it needs for its step; returns this rank's slab."""
        sent = [self._pack(step) for step in steps]
        own = steps[self._ranks.index]
        parts = [] if own is None else self.turns.parts(own)
        itemsize = 0 if own is None else self.turns.tensors[own.name].dtype.itemsize
        sizes = [0] * self._ranks.size
        for part in parts:
            sizes[part.holder] += part.box.num_elements * itemsize
        received = torch.cat(sent)
        if self._group is not None:
            lengths = [len(values) for values in sent]
            received = exchange_rows(received, lengths, sizes, self._group, kind="save")
        return received.cpu() if own is None else self._unpack(own, parts, received.cpu())

    def _pack(self, step: Step | None) -> Tensor:
        """The bytes that this rank sends for a step."""
        pieces = [torch.empty(0, dtype=torch.uint8, device=self._device)]
        for part in () if step is None else self.turns.parts(step):
            if step is not None and part.holder == self._ranks.index:
                local, box = self._own[part.piece.ours]
                values = local[part.box.within(box)].to(self.turns.tensors[step.name].dtype)
                values = as_bytes(part.piece.as_theirs(values))
                pieces.append(values.to(self._device))
        return torch.cat(pieces)

    def _unpack(self, step: Step, parts: Sequence[Part], received: Tensor) -> Tensor:
        dtype = self.turns.tensors[step.name].dtype
        slab = torch.empty(step.slab.shape, dtype=dtype)
        begin = 0
        for part in parts:
            place = part.piece.to_theirs(part.box)
            end = begin + place.num_elements * dtype.itemsize
            # Copied, because a part's bytes may begin where no element of its dtype may.
            values = received[begin:end].clone().view(dtype)
            slab[place.within(step.slab)] = values.view(place.shape)
            begin = end
        return slab


class _Files:
    """The files of one rank, one after the other.

    An error is kept until the end: the other ranks still need what this one holds.
    """

    def __init__(self, folder: Path, turns: Turns) -> None:
        self.hashes: dict[str, str] = {}
        self._folder, self._turns = folder, turns
        self._name = ""
        self._writer: folders.ShardWriter | None = None
        self._error: Exception | None = None

    def write(self, step: Step, values: Tensor) -> None:
        """The values of a step."""
        if self._error is not None:
            return
        try:
            if self._writer is None or step.file != self._name:
                self._end()
                self._name = step.file
                path = self._folder / step.file
                self._writer = folders.ShardWriter(path, self._turns.of_file(step.file))
            self._writer.write(values)
            if step.last:
                self._writer.end_of(step.name)
        except Exception as error:
            self._error = error

    def close(self) -> None:
        """End the last file; raises what went wrong before."""
        if self._error is not None:
            with contextlib.suppress(OSError):
                self._end()
            raise self._error
        self._end()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.hashes |= self._writer.hashes
        self._writer = None
