"""Which file holds which box of which tensor.

Tensors saved under a stem, say ``model``, are one file ``model.safetensors`` that holds each of
them whole, or files ``model-00003-of-00008.safetensors`` of boxes and ``model.index.json``. That
has ``files``, their names, and ``tensors``: by name ``dtype``, ``shape`` and ``boxes``, of which
each is ``[file, start, stop]``, where ``file`` counts in ``files``. In its file a box is called as
its tensor if it is all of it, else ``name[0:2,4:8]``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.files import DTYPES, Written, dtype_name, write_json


@dataclass(frozen=True)
class Entry:
    """A saved tensor.

    Attributes:
        dtype: Of its elements.
        shape: Of the whole tensor.
        boxes: File and place of each of its parts; disjoint, and together all of it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[tuple[str, Box], ...]


def single_file(stem: str) -> str:
    """The file of one writer, which holds every tensor whole."""
    return f"{stem}.safetensors"


def numbered_file(stem: str, writer: int, num_writers: int) -> str:
    """The file of one writer among several, counted from 0."""
    return f"{stem}-{writer + 1:05d}-of-{num_writers:05d}.safetensors"


def index_file(stem: str) -> str:
    """The index of several writers' files."""
    return f"{stem}.index.json"


def key(name: str, box: Box, shape: tuple[int, ...]) -> str:
    """What a box is called in its file."""
    return name if box == Box.whole(shape) else f"{name}{box}"


def check_covered(name: str, entry: Entry, where: str) -> None:
    """Raise if the boxes of a tensor, which are disjoint, are not all of it."""
    covered = sum(box.num_elements for _, box in entry.boxes)
    if covered != (expected := math.prod(entry.shape)):
        raise UserError(f"{where}: {covered} of {expected} elements of {name} are there")


def write_index(folder: Path, stem: str, entries: Mapping[str, Entry]) -> Written:
    """Write the index of several writers' files."""
    files = sorted({file for entry in entries.values() for file, _ in entry.boxes})
    number = {file: count for count, file in enumerate(files)}
    tensors = {
        name: {
            "dtype": dtype_name(entry.dtype),
            "shape": entry.shape,
            "boxes": [[number[file], box.start, box.stop] for file, box in entry.boxes],
        }
        for name, entry in entries.items()
    }
    content = {"files": files, "tensors": tensors}
    return write_json(folder / index_file(stem), content, indent=None)


def read_index(folder: Path, stem: str) -> dict[str, Entry]:
    """What is saved under a stem, by name.

    Args:
        folder: Where it is.
        stem: For example ``"model"``.

    Raises:
        UserError: If there is nothing, it cannot be read, or a tensor lacks a part.
    """
    path = folder / index_file(stem)
    if not path.exists():
        return _of_single(folder / single_file(stem))
    try:
        content = json.loads(path.read_text())
        files = content["files"]
        entries = {name: _entry(saved, files) for name, saved in content["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} cannot be read as an index of tensors: {error!r}") from error
    for name, entry in entries.items():
        check_covered(name, entry, str(path))
    return entries


def _entry(saved: Mapping[str, Any], files: list[str]) -> Entry:
    boxes = (
        (files[number], Box(tuple(start), tuple(stop))) for number, start, stop in saved["boxes"]
    )
    return Entry(DTYPES[saved["dtype"]], tuple(saved["shape"]), tuple(boxes))


def _of_single(file: Path) -> dict[str, Entry]:
    if not file.is_file():
        raise UserError(f"{file} is missing")
    entries = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                part = tensors.get_slice(name)
                shape = tuple(part.get_shape())
                whole = (file.name, Box.whole(shape))
                entries[name] = Entry(DTYPES[part.get_dtype()], shape, (whole,))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error!r}") from error
    return entries
