"""Checkpoints of t5x: a folder with a zarr array for each parameter, and an index in MessagePack.

``checkpoint_500000/`` holds ``checkpoint``, the index, and ``target.decoder.decoder_norm.scale/``
and the like, zarr arrays of version 2 in chunks that are usually gzipped. The index is a table of
tables down to ``{"driver": "zarr", ...}`` for an array in a folder, or a small array itself. What
is below ``target`` is the model; the rest, the optimizer's, is passed over. A folder without an
index is read by the names in it. Needs the extra ``t5x``.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertmesh.convert import msgpack
from expertmesh.convert.slabs import SLAB_BYTES
from expertmesh.convert.source import Source, Stored
from expertmesh.errors import UserError, require
from expertmesh.parallel.checkpoint.box import Box

INDEX_FILE, TARGET = "checkpoint", "target"
VERSION = 3
_STEP = re.compile(r"checkpoint_(\d+)")
_PLACEHOLDER = "PLACEHOLDER://"
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def is_t5x(path: Path) -> bool:
    """Whether there is a t5x checkpoint, or a folder of several."""
    return _is_checkpoint(path) or bool(_steps(path))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest in a folder of several."""
    if path.is_file() and path.name == INDEX_FILE:
        return path.parent
    if not _is_checkpoint(path) and (steps := _steps(path)):
        return steps[-1]
    return path


class T5xCheckpoint(Source):
    """The model in a t5x checkpoint.

    Names are paths below ``target``, such as ``decoder/decoder_norm/scale``.

    Args:
        path: Of the checkpoint, as ``find_checkpoint`` gives it.

    Raises:
        UserError: If it is none, or an array in it is incomplete.
    """

    def __init__(self, path: Path) -> None:
        self._tensorstore = require("tensorstore", extra="t5x")
        self.path = path
        self._inline: dict[str, Tensor] = {}
        self._stores: dict[str, Any] = {}
        self._whole: tuple[str, Tensor] | None = None
        self.tensors = {}
        for name, leaf in sorted(_leaves(path).items()):
            if isinstance(leaf, Tensor):
                self._inline[name] = leaf
                self.tensors[name] = Stored(leaf.dtype, tuple(leaf.shape))
            elif (store := self._opened(name, leaf)) is not None:
                self._stores[name] = store
                self.tensors[name] = Stored(_DTYPES[store.dtype.name], tuple(store.shape))

    def read(self, name: str, box: Box) -> Tensor:
        whole = Box.whole(self.tensors[name].shape)
        if name in self._inline:
            return self._inline[name][box.within(whole)]
        store = self._stores[name]
        chunk = math.prod(store.chunk_layout.read_chunk.shape or (1,))
        if chunk * store.dtype.numpy_dtype.itemsize <= SLAB_BYTES:
            return self._values(store[box.within(whole)])
        # Chunks are unpacked whole, so that reading such a one in parts would do it for each.
        if self._whole is None or self._whole[0] != name:
            self._whole = None
            self._whole = (name, self._values(store))
        return self._whole[1][box.within(whole)]

    def _values(self, store: Any) -> Tensor:
        try:
            values = store.read().result()
        except ValueError as error:
            raise UserError(f"{self.path}: an array cannot be read: {error}") from error
        if store.dtype.name == "bfloat16":  # NumPy's is an extension that torch does not know
            return torch.from_numpy(values.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(values)

    def _opened(self, name: str, spec: Mapping[str, Any]) -> Any:
        """The array of a name; None where its folder is not there."""
        folder = self.path / spec["folder"]
        if not folder.is_dir():
            return None
        wanted: dict[str, Any] = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
        }
        # Copies that left files with a dot behind lack it; the index says the same.
        stated = not (folder / ".zarray").is_file()
        if stated:
            wanted |= {key: spec[key] for key in ("dtype", "metadata") if key in spec}
        try:
            store = self._tensorstore.open(
                wanted, open=True, read=True, assume_metadata=stated
            ).result()
        except (ValueError, OSError) as error:
            raise UserError(f"{folder} is no zarr array: {error}") from error
        if store.dtype.name not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise UserError(f"{folder} is of dtype {store.dtype.name}; expected one of {known}")
        self._check_chunks(folder, store)
        return store

    def _check_chunks(self, folder: Path, store: Any) -> None:
        """Raise if chunks are missing, which would read as zeros."""
        metadata = store.spec().to_json()["metadata"]
        shape, chunks = metadata["shape"], metadata["chunks"]
        separator = metadata.get("dimension_separator", ".")
        counts = [math.ceil(size / chunk) for size, chunk in zip(shape, chunks, strict=True)]
        names = _chunk_names(counts, separator)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"{folder} lacks {len(missing)} of its {math.prod(counts)} chunks, {missing[0]} "
                "first; copy the folder again"
            )


def _chunk_names(counts: list[int], separator: str) -> Iterator[str]:
    if not counts:
        yield "0"
    for place in itertools.product(*map(range, counts)) if counts else ():
        yield separator.join(map(str, place))


def _is_checkpoint(path: Path) -> bool:
    if path.is_file():
        return path.name == INDEX_FILE
    return (path / INDEX_FILE).is_file() or any(path.glob(f"{TARGET}.*/"))


def _steps(path: Path) -> list[Path]:
    """Checkpoints in a folder, by step."""
    folders = path.iterdir() if path.is_dir() else ()
    found = [(int(match[1]), entry) for entry in folders if (match := _STEP.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found) if _is_checkpoint(entry)]


def _leaves(path: Path) -> dict[str, Any]:
    """By name below ``target``: a small array, or where the array is and what is said of it."""
    index = path / INDEX_FILE
    if not index.is_file():
        folders = sorted(path.glob(f"{TARGET}.*/"))
        if not folders:
            raise UserError(
                f"{path} is no t5x checkpoint: it has no {INDEX_FILE} and no {TARGET}.*"
            )
        names = [folder.name for folder in folders]
        return {_path(name): {"folder": name} for name in names}
    try:
        content = msgpack.unpack(index.read_bytes())
        tables = [content, content.get("optimizer"), content.get("_optimizer")]
        target = next(table[TARGET] for table in tables if table and table.get(TARGET))
    except (UserError, AttributeError, StopIteration, TypeError) as error:
        said = f": {error}" if isinstance(error, UserError) else f": it has no {TARGET}"
        raise UserError(f"{index} is no index of t5x{said}") from error
    return dict(_flat(target, ""))


def _path(folder: str) -> str:
    return folder.removeprefix(f"{TARGET}.").replace(".", "/")


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, str) and value.startswith(_PLACEHOLDER):
            yield name, {"folder": value.removeprefix(_PLACEHOLDER)}
        elif isinstance(value, dict) and value.get("driver") == "zarr":
            # Only the last part of its path counts: the checkpoint may have been on another disk.
            place = value.get("path") or value.get("kvstore", {}).get("path", "")
            yield name, value | {"folder": place.rstrip("/").rpartition("/")[2]}
        elif isinstance(value, dict):
            yield from _flat(value, f"{name}/")


def spec_of(name: str, stored: Stored, chunks: tuple[int, ...]) -> dict[str, Any]:
    """What the index says of an array, with a path that is relative to its folder.

    Args:
        name: Below ``target``.
        stored: Dtype and shape.
        chunks: Shape of a chunk.
    """
    dtype = str(stored.dtype).removeprefix("torch.")
    return {
        "driver": "zarr",
        "dtype": dtype,
        "kvstore": {"driver": "file", "path": f"{TARGET}.{name.replace('/', '.')}/"},
        "metadata": {
            "shape": list(stored.shape),
            "chunks": list(chunks),
            "compressor": {"id": "gzip", "level": 1},
        },
    }


def index_of(specs: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The index of arrays.

    Args:
        specs: As ``spec_of`` gives them, by name.
    """
    target: dict[str, Any] = {}
    for name, spec in specs.items():
        *tables, last = name.split("/")
        table = target
        for key in tables:
            table = table.setdefault(key, {})
        table[last] = dict(spec)
    state = {"step": 0, "param_states": {}}
    content = {"version": VERSION, "optimizer": {"target": target, "state": state}}
    return msgpack.pack(content)
