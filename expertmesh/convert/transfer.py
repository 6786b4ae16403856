"""From one layout into another of the same model, a slab at a time, and whether it went well."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from expertmesh.convert.check import check_floating, check_tensors, named
from expertmesh.convert.destination import Destination, hash_of
from expertmesh.convert.folder import aligned, read_manifest
from expertmesh.convert.layout import Layout, Piece
from expertmesh.convert.slabs import slabs
from expertmesh.convert.source import Source, Stored
from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.files import as_bytes

Progress = Callable[[int], None]


def converted(
    source: Source, files: Layout, wanted: Layout, dtype: torch.dtype | None
) -> dict[str, Stored]:
    """What a conversion will write.

    Args:
        source: Where the values are.
        files: How they lie there.
        wanted: How they are to lie.
        dtype: Of the result; None keeps what each has. What is made of tensors of several dtypes
            has one that holds all their values.

    Raises:
        UserError: Naming all tensors of the source that are missing, unexpected or misshapen.
    """
    check_tensors(files, source.shapes, str(source.path))
    check_floating(source.tensors, str(source.path))
    tensors = {}
    for name, shape in wanted.their_shapes.items():
        tensors[name] = Stored(dtype or _dtype_of(wanted.of_theirs[name], source, files), shape)
    return aligned(tensors)


def _dtype_of(pieces: Iterable[Piece], source: Source, files: Layout) -> torch.dtype:
    """The dtype of what is there, or the narrowest that holds several."""
    found = {
        source.tensors[origin.theirs].dtype
        for piece in pieces
        for origin in files.of_ours[piece.ours]
        if origin.box.overlap(piece.box)
    }
    return functools.reduce(torch.promote_types, found)


def transfer(
    source: Source,
    files: Layout,
    wanted: Layout,
    destination: Destination,
    config: Mapping[str, Any],
    progress: Progress = lambda _: None,
) -> None:
    """Write all tensors of a destination, read them back, and compare.

    Args:
        source: Where the values are.
        files: How they lie there.
        wanted: How they are to lie.
        destination: Takes them; it was announced what ``converted`` says.
        config: Goes into ``config.json``.
        progress: Called with the number of elements written since the last call.

    Raises:
        UserError: If a value does not fit its new dtype, or what is on the disk in the end is not
            what was written.
    """
    for name in destination.tensors:
        for slab in destination.slabs(name):
            values = assemble(source, files, wanted, name, slab, destination.tensors[name].dtype)
            destination.write(name, slab, values)
            progress(values.numel())
    destination.close(config)
    check_written(destination.reopen(), destination.tensors, destination.hashes)


def assemble(
    source: Source, files: Layout, wanted: Layout, name: str, slab: Box, dtype: torch.dtype
) -> Tensor:
    """A part of a tensor of one layout from a source in another.

    Raises:
        UserError: If a finite value is none in ``dtype``.
    """
    values = torch.empty(slab.shape, dtype=dtype)
    for piece in wanted.of_theirs[name]:
        if (in_slab := piece.their_box.overlap(slab)) is None:
            continue
        box = piece.to_ours(in_slab)
        for origin in files.of_ours[piece.ours]:
            if (common := origin.box.overlap(box)) is None:
                continue
            read = source.read(origin.theirs, origin.to_theirs(common))
            place = piece.to_theirs(common).within(slab)
            values[place] = piece.as_theirs(origin.as_ours(_cast(read, dtype, name), common))
    return values


def check_written(found: Source, tensors: Mapping[str, Stored], hashes: Mapping[str, str]) -> None:
    """Compare what is on the disk with what it should be, in names, shapes, dtypes and bytes.

    Raises:
        UserError: Naming all tensors that differ.
    """
    faults = []
    if missing := [name for name in tensors if name not in found.tensors]:
        faults.append(f"missing: {named(missing)}")
    if extra := [name for name in found.tensors if name not in tensors]:
        faults.append(f"unexpected: {named(extra)}")
    both = [name for name in tensors if name in found.tensors]
    if other := [name for name in both if found.tensors[name] != tensors[name]]:
        faults.append(f"of another shape or dtype: {named(other)}")
    same = [name for name in both if found.tensors[name] == tensors[name]]
    if wrong := [name for name in same if hash_of(found, name) != hashes[name]]:
        faults.append(f"with other values: {named(wrong)}")
    if faults:
        raise UserError(f"{found.path} is not what it should be; " + "; ".join(faults))


def check_manifest(found: Source) -> None:
    """Compare a folder with the manifest in it.

    Raises:
        UserError: If it has none, or naming all tensors that differ.
    """
    tensors, hashes = read_manifest(found.path)
    check_written(found, tensors, hashes)


def check_same(
    source: Source, files: Layout, found: Source, wanted: Layout, progress: Progress
) -> None:
    """Compare a folder with what converting a source would give, without writing.

    Raises:
        UserError: Naming all tensors that differ.
    """
    check_tensors(files, source.shapes, str(source.path))
    check_tensors(wanted, found.shapes, str(found.path))
    wrong = []
    for name, stored in found.tensors.items():
        for slab in slabs(Box.whole(stored.shape), stored.dtype.itemsize):
            values = assemble(source, files, wanted, name, slab, stored.dtype)
            progress(values.numel())
            if not torch.equal(as_bytes(values), as_bytes(found.read(name, slab))):
                wrong.append(name)
                break
    if wrong:
        raise UserError(f"{found.path} differs from {source.path} in {named(wrong)}")


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = values.to(dtype)
    if cast.dtype == values.dtype or cast.numel() == 0:
        return cast
    # The extremes first: comparing all needs several times the memory.
    lowest, highest = cast.aminmax()
    ends = torch.stack([lowest, highest])
    if not ends.isfinite().all() and not torch.equal(cast.isfinite(), values.isfinite()):
        most = torch.finfo(dtype).max
        raise UserError(
            f"{name} holds values beyond {most:.5g}, the largest of {dtype}; set --dtype bf16"
        )
    return cast
