"""Pickled weights, ``pytorch_model.bin``, as older folders of the hub have them.

torch's loader of plain tensors opens them, which runs no code of theirs, and maps the files: a part
comes into memory when it is read.
"""

import json
import pickle
from pathlib import Path

import torch
from torch import Tensor

from expertmesh.convert.source import Source, Stored
from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint.box import Box

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def is_pickled(path: Path) -> bool:
    """Whether there are such weights."""
    return (path / SINGLE).is_file() or (path / INDEX).is_file()


class PickledFolder(Source):
    """A folder of pickled weights: one file, or several and an index.

    Args:
        path: The folder.

    Raises:
        UserError: If files cannot be read, or hold anything but named tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Tensor] = {}
        for file in _files(path):
            self._values |= _mapped(path / file)
        self.tensors = {
            name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._values.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        return self._values[name][box.within(Box.whole(self.tensors[name].shape))]


def _files(path: Path) -> list[str]:
    if not (path / INDEX).is_file():
        return [SINGLE]
    try:
        return sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / INDEX} is no index of tensors: {error!r}") from error


def _mapped(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"{file} is missing; {INDEX} beside it names it")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be read as pickled tensors: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise UserError(f"{file} holds other things than named tensors")
    return found
