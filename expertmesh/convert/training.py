"""A training run's checkpoint as a source: our own names, tensors in boxes over files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertmesh.convert.source import Source, Stored
from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint import read_index
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.checkpoint.index import key

STEM = "model"


class TrainingCheckpoint(Source):
    """The model in a checkpoint that any number of ranks saved.

    Args:
        path: Its folder, ``RUN/checkpoints/step_00000100``.

    Raises:
        UserError: If it is none, or a tensor in it lacks a part.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = read_index(path, STEM)
        self.tensors = {
            name: Stored(entry.dtype, entry.shape) for name, entry in self._entries.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        entry = self._entries[name]
        values = torch.empty(box.shape, dtype=entry.dtype)
        for file, saved in entry.boxes:
            if (common := saved.overlap(box)) is None:
                continue
            try:
                with safe_open(self.path / file, framework="pt") as tensors:
                    part = tensors.get_slice(key(name, saved, entry.shape))
                    values[common.within(box)] = part[common.within(saved)]
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.path / file} cannot be read: {error}") from error
        return values
