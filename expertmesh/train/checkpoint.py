"""Checkpoints that are whole or absent.

A checkpoint is a folder. It is written under another name beside its place, flushed to disk,
described by a manifest with the SHA-256 of each file, and renamed last; so a folder with the
right name is complete, and the previous one is untouched until then. Tensors are safetensors, the
rest is JSON: nothing is unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.train.tensors import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)
_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: Its folder.
        step: Optimizer steps done when it was saved.
    """

    path: Path
    step: int

    def verify(self) -> None:
        """Compare every file with the manifest.

        Raises:
            UserError: Naming the first file that is absent or whose content differs.
        """
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            files = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} has no readable {MANIFEST}; it is not used") from None
        if unlisted := [name for name in (MODEL, OPTIMIZER, STATE) if name not in files]:
            raise UserError(f"{self.path / MANIFEST} has no hash of {unlisted}; it is not used")
        for name, expected in files.items():
            file = self.path / name
            if not file.is_file():
                raise UserError(f"{file} is missing; the checkpoint is not used")
            if (got := _sha256(file)) != expected:
                raise UserError(
                    f"{file} is corrupt: expected SHA-256 {expected[:16]}..., got {got[:16]}...; "
                    "the checkpoint is not used"
                )

    def state(self) -> dict[str, Any]:
        """What ``save`` was given beside the tensors."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text())
        return state

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into ``model``; an error names every tensor that does not fit."""
        load_model_tensors(model, load_file(self.path / MODEL), str(self.path))

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give ``optimizer`` its state back; parameters are matched by name."""
        saved = load_file(self.path / OPTIMIZER)
        load_optimizer_tensors(model, optimizer, saved, str(self.path))


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        path: ``RUN/checkpoints``; made when the first one is saved.
        keep: How many of the newest to keep.
    """

    def __init__(self, path: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise UserError(f"train.keep must be at least 1, got {keep}; set train.keep = 1")
        self.path = path
        self.keep = keep

    def complete(self) -> list[Checkpoint]:
        """Finished checkpoints, oldest first. Contents are not read: see ``Checkpoint.verify``."""
        if not self.path.is_dir():
            return []
        folders = [entry for entry in self.path.iterdir() if entry.is_dir()]
        found = ((_NAME.fullmatch(entry.name), entry) for entry in folders)
        return sorted(
            (Checkpoint(entry, int(match[1])) for match, entry in found if match is not None),
            key=lambda checkpoint: checkpoint.step,
        )

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose hashes agree.

        Returns:
            The checkpoint, or None where the run has none, and a line for each newer one that was
            passed over.

        Raises:
            UserError: If there are checkpoints and every one of them is damaged.
        """
        refused: list[str] = []
        for checkpoint in reversed(self.complete()):
            try:
                checkpoint.verify()
            except UserError as error:
                refused.append(str(error))
            else:
                return checkpoint, refused
        if refused:
            raise UserError("no usable checkpoint: " + "; ".join(refused))
        return None, refused

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
    ) -> Checkpoint:
        """Write one checkpoint, then remove those beyond ``keep``.

        Args:
            step: Optimizer steps done.
            model: Parameters and persistent buffers are saved.
            optimizer: Its state is saved by parameter name.
            state: Anything else, as JSON.

        Raises:
            UserError: If it cannot be written; earlier checkpoints are as they were.
        """
        final = self.path / f"step_{step:08d}"
        unfinished = self.path / f"{_UNFINISHED}{final.name}"
        try:
            self._remove_unfinished()
            unfinished.mkdir(parents=True)
            _save_tensors(model_tensors(model), unfinished / MODEL)
            _save_tensors(optimizer_tensors(model, optimizer), unfinished / OPTIMIZER)
            _write_json({"step": step, **state}, unfinished / STATE)
            hashes = {name: _sha256(unfinished / name) for name in (MODEL, OPTIMIZER, STATE)}
            _write_json({"files": hashes}, unfinished / MANIFEST)
            _flush_folder(unfinished)
            if final.exists():
                shutil.rmtree(final)
            unfinished.rename(final)
            _flush_folder(self.path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(self._cannot_save(step, error)) from error
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old.path, ignore_errors=True)
        return Checkpoint(final, step)

    def _cannot_save(self, step: int, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        earlier = self.complete()
        last = f"the last good one is {earlier[-1].path}" if earlier else "there is no earlier one"
        return (
            f"could not save the checkpoint of step {step} in {self.path}: {reason}; {last}; "
            "make room on the disk and start the same command again"
        )

    def _remove_unfinished(self) -> None:
        for left_over in self.path.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left_over, ignore_errors=True)


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    _flush(file)


def _write_json(content: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
    _flush(file)


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _flush_folder(path: Path) -> None:
    """Make names durable; systems without folder handles (Windows) do that by themselves."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
