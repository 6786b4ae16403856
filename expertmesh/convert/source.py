"""Tensors that lie in files, read in boxes."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.files import DTYPES
from expertmesh.parallel.checkpoint.load import MAPPED_BYTES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Source(ABC):
    """Named tensors in a folder.

    Attributes:
        path: The folder.
        tensors: What is there, by name.
    """

    path: Path
    tensors: Mapping[str, Stored]

    @abstractmethod
    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor, in host memory and in its own dtype.

        Raises:
            UserError: If the files do not hold what they announced.
        """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}


class SafetensorsFolder(Source):
    """A folder as Hugging Face's hub has them: one safetensors file, or several and an index.

    Pages of a mapped file stay in memory, so that it is mapped anew after every
    ``MAPPED_BYTES`` that were read.

    Args:
        path: The folder.

    Raises:
        UserError: If there are no such files, or they cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = {}
        self._file_of: dict[str, str] = {}
        place = _place_of(path)
        for file in sorted(set(place.values())):
            stored = _stored(path / file)
            self.tensors |= stored
            # Tensors that the index leaves out too: those must not pass unnoticed.
            self._file_of |= dict.fromkeys(stored, file)
        if elsewhere := sorted(n for n, file in place.items() if self._file_of.get(n) != file):
            raise UserError(f"{path / INDEX} names tensors that are not there: {elsewhere}")
        self._open: tuple[str, Any] | None = None
        self._num_bytes = 0

    def read(self, name: str, box: Box) -> Tensor:
        file, stored = self._file_of[name], self.tensors[name]
        self._num_bytes += box.num_elements * stored.dtype.itemsize
        try:
            if self._open is None or self._open[0] != file or self._num_bytes > MAPPED_BYTES:
                self._open, self._num_bytes = None, 0
                self._open = (file, safe_open(self.path / file, framework="pt"))
            handle = self._open[1]
            if box == Box.whole(stored.shape):
                return handle.get_tensor(name)
            return handle.get_slice(name)[box.within(Box.whole(stored.shape))]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path / file} cannot be read: {error}") from error


def _place_of(path: Path) -> dict[str, str]:
    """File names by tensor, as the index says, or of the one file there is."""
    if (path / INDEX).is_file():
        try:
            return dict(json.loads((path / INDEX).read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / INDEX} is no index of tensors: {error!r}") from error
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder that it is in, {path.parent}")
    if not (path / SINGLE).is_file():
        raise UserError(f"{path} has neither {SINGLE} nor {INDEX}")
    return dict.fromkeys(_stored(path / SINGLE), SINGLE)


def _stored(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise UserError(f"{file} is missing; {INDEX} beside it names it")
    found = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                part = tensors.get_slice(name)
                found[name] = Stored(DTYPES[part.get_dtype()], tuple(part.get_shape()))
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error!r}") from error
    return found
