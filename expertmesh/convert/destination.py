"""Where converted tensors go, slab after slab."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from expertmesh.convert import folder as folders
from expertmesh.convert.slabs import SLAB_BYTES, slabs
from expertmesh.convert.source import SafetensorsFolder, Source, Stored
from expertmesh.convert.t5x import INDEX_FILE, T5xCheckpoint, index_of, spec_of
from expertmesh.errors import require
from expertmesh.parallel.checkpoint import write_json
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.files import as_bytes


class Destination(ABC):
    """A folder that is being written. Tensors come in the order in which they were announced.

    Args:
        folder: An empty one.
        tensors: What will be written.

    Attributes:
        hashes: SHA-256 in hex of the bytes of each tensor that is complete.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]) -> None:
        self.folder = folder
        self.tensors = tensors
        self.hashes: dict[str, str] = {}

    def slabs(self, name: str) -> Iterator[Box]:
        """The parts in which a tensor is to be given."""
        stored = self.tensors[name]
        return slabs(Box.whole(stored.shape), stored.dtype.itemsize, SLAB_BYTES)

    @abstractmethod
    def write(self, name: str, slab: Box, values: Tensor) -> None:
        """The next slab of a tensor; its last one completes it."""

    @abstractmethod
    def close(self, config: Mapping[str, Any]) -> None:
        """Write what describes the tensors, and the configuration."""

    @abstractmethod
    def reopen(self) -> Source:
        """What was written, to be read."""


class SafetensorsDestination(Destination):
    """A folder as the hub has them.

    Args:
        folder: An empty one.
        tensors: What will be written.
        shard_bytes: Of a file, at most, unless one tensor is larger.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Stored], shard_bytes: int) -> None:
        super().__init__(folder, tensors)
        self.files = folders.shards(tensors, shard_bytes)
        self._file_of = {name: file for file, names in self.files.items() for name in names}
        self._writer: folders.ShardWriter | None = None
        self._file = ""

    def write(self, name: str, slab: Box, values: Tensor) -> None:
        if self._writer is None or self._file != self._file_of[name]:
            self._end()
            self._file = self._file_of[name]
            of_file = {name: self.tensors[name] for name in self.files[self._file]}
            self._writer = folders.ShardWriter(self.folder / self._file, of_file)
        self._writer.write(values)
        if slab.stop == self.tensors[name].shape:
            self._writer.end_of(name)

    def close(self, config: Mapping[str, Any]) -> None:
        self._end()
        folders.describe(self.folder, self.files, self.tensors, self.hashes, config)

    def reopen(self) -> Source:
        return SafetensorsFolder(self.folder)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.hashes |= self._writer.hashes
        self._writer = None


class T5xDestination(Destination):
    """A t5x checkpoint of the model alone, without an optimizer's state."""

    def __init__(self, folder: Path, tensors: Mapping[str, Stored]) -> None:
        super().__init__(folder, tensors)
        self._tensorstore = require("tensorstore", extra="t5x")
        # A slab is a chunk, so that no chunk is ever read to be changed.
        self._specs = {
            name: spec_of(name, stored, next(self.slabs(name)).shape)
            for name, stored in tensors.items()
        }
        self._store: Any = None
        self._name = ""
        self._digest: Any = None

    def write(self, name: str, slab: Box, values: Tensor) -> None:
        if name != self._name:
            self._store, self._name = self._created(name), name
            self._digest = hashlib.sha256()
        raw = as_bytes(values).numpy()
        self._digest.update(raw.data)
        whole = Box.whole(self.tensors[name].shape)
        array = raw.view(self._store.dtype.numpy_dtype).reshape(slab.shape)
        self._store[slab.within(whole)].write(array).result()
        if slab.stop == whole.stop:
            self.hashes[name] = self._digest.hexdigest()

    def close(self, config: Mapping[str, Any]) -> None:
        (self.folder / INDEX_FILE).write_bytes(index_of(self._specs))
        write_json(self.folder / folders.CONFIG, config, indent=2)
        folders.write_manifest(self.folder, self.tensors, self.hashes)

    def reopen(self) -> Source:
        return T5xCheckpoint(self.folder)

    def _created(self, name: str) -> Any:
        spec = self._specs[name]
        path = f"{self.folder / spec['kvstore']['path']}/"
        return self._tensorstore.open(
            {
                **spec,
                "kvstore": {"driver": "file", "path": path},
                # Chunks of zeros too: a reader must be able to tell them from missing ones.
                "store_data_equal_to_fill_value": True,
            },
            create=True,
        ).result()


def hash_of(source: Source, name: str) -> str:
    """SHA-256 of a tensor's bytes as they are read."""
    digest = hashlib.sha256()
    stored = source.tensors[name]
    for slab in slabs(Box.whole(stored.shape), stored.dtype.itemsize):
        digest.update(as_bytes(source.read(name, slab)).numpy().data)
    return digest.hexdigest()


def num_bytes(tensors: Mapping[str, Stored]) -> int:
    """Of all of them together."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
