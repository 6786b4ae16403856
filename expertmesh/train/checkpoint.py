"""Checkpoints that are whole or absent, and the same whatever mesh saves or loads them.

A checkpoint is a folder. It is written under another name beside its place, each rank its own
files, flushed to disk, described by a manifest with the SHA-256 of every file, and renamed last by
one rank; so a folder with the right name is complete, and the previous one is untouched until then.
Tensors are safetensors, the rest is JSON: nothing is unpickled. Ranks must share the folder.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint import (
    index_file,
    load_tensors,
    plan,
    read_index,
    sha256,
    single_file,
)
from expertmesh.train.saving import MANIFEST, STATE, UNFINISHED, Saving
from expertmesh.train.tensors import (
    check_model,
    empty_optimizer_tensors,
    model_tensors,
    optimized,
    optimizer_tensors,
    set_optimizer_tensors,
)

MODEL, OPTIMIZER = "model", "optimizer"
# A list of files in a message stops here; the rest is counted.
_MOST_FAULTS = 4
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. All ranks call its methods together.

    Attributes:
        path: Its folder.
        step: Optimizer steps done when it was saved.
        ranks: Those that read it together; this process alone unless said otherwise. Any number
            may have saved it.
    """

    path: Path
    step: int
    ranks: Agreement = field(default_factory=Agreement, compare=False, repr=False)

    def verify(self) -> None:
        """Compare every file with the manifest; each rank reads some of them.

        Raises:
            UserError: On every rank, naming files that are absent or whose content differs.
        """
        with self.ranks.together():
            files = self._manifest()
            own = sorted(files)[self.ranks.index :: self.ranks.size]
            if faults := [text for name in own if (text := _fault(self.path / name, files[name]))]:
                listed = "; ".join(faults[:_MOST_FAULTS])
                more = f"; and {rest} more" if (rest := len(faults) - _MOST_FAULTS) > 0 else ""
                raise UserError(f"{listed}{more}; the checkpoint is not used")

    def state(self) -> dict[str, Any]:
        """What ``save`` was given beside the tensors, as the first rank reads it.

        Raises:
            UserError: On every rank, if it cannot be read.
        """
        state: dict[str, Any] = {}
        with self.ranks.together():
            if self.ranks.first:
                state = json.loads((self.path / STATE).read_text())
        return self.ranks.gather(state)[0]

    def load_model(self, model: nn.Module) -> None:
        """Copy the weights into ``model``, each rank what it holds of it.

        Raises:
            UserError: On every rank, naming every tensor that does not fit; then nothing was
                copied anywhere. Also if a file is missing or cannot be read.
        """
        own = model_tensors(model)
        elsewhere = self._everyones(own)
        with self.ranks.together():
            saved = read_index(self.path, MODEL)
            check_model(own, saved, str(self.path), elsewhere=elsewhere)
        with self.ranks.together():
            load_tensors(self.path, saved, own)

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give ``optimizer`` its state back; parameters are matched by name.

        Raises:
            UserError: As ``load_model``.
        """
        elsewhere = self._everyones(optimized(model, optimizer))
        with self.ranks.together():
            saved = read_index(self.path, OPTIMIZER)
            own = empty_optimizer_tensors(
                model, optimizer, saved, str(self.path), elsewhere=elsewhere
            )
        with self.ranks.together():
            load_tensors(self.path, saved, own)
        set_optimizer_tensors(model, optimizer, own)

    def _everyones(self, own: Mapping[str, Any]) -> set[str]:
        return {name for names in self.ranks.gather(list(own)) for name in names}

    def _manifest(self) -> dict[str, str]:
        """Hashes by file."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            files = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} has no readable {MANIFEST}; it is not used") from None
        needed = [(STATE,), *((single_file(s), index_file(s)) for s in (MODEL, OPTIMIZER))]
        if unlisted := [" or ".join(e) for e in needed if not any(name in files for name in e)]:
            raise UserError(f"{self.path / MANIFEST} has no hash of {unlisted}; it is not used")
        return files


class CheckpointFolder:
    """The checkpoints of one run. All ranks call its methods together.

    Args:
        path: ``RUN/checkpoints``; made when the first one is saved.
        keep: How many of the newest to keep; those found damaged do not count.
        group: Those that hold the model together; None is this process alone.
    """

    def __init__(self, path: Path, *, keep: int = 2, group: Group | None = None) -> None:
        if keep < 1:
            raise UserError(f"train.keep must be at least 1, got {keep}; set train.keep = 1")
        self.path = path
        self.keep = keep
        # Two, so that reading may go on while a thread writes.
        self._readers, self._writers = Agreement(group), Agreement(group)
        self._saving: Saving | None = None
        self._damaged: set[int] = set()

    def complete(self) -> list[Checkpoint]:
        """Finished checkpoints, oldest first, as this rank sees them.

        Contents are not read: see ``Checkpoint.verify``.
        """
        if not self.path.is_dir():
            return []
        folders = [entry for entry in self.path.iterdir() if entry.is_dir()]
        found = ((_NAME.fullmatch(entry.name), entry) for entry in folders)
        return sorted(
            (
                Checkpoint(entry, int(match[1]), self._readers)
                for match, entry in found
                if match is not None
            ),
            key=lambda checkpoint: checkpoint.step,
        )

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first, as the first rank sees them.

        Raises:
            UserError: On every rank, if the folder cannot be looked at.
        """
        own: list[int] = []
        with self._readers.together():
            own = [checkpoint.step for checkpoint in self.complete()]
        return self._readers.gather(own)[0]

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose hashes agree, after a save under way has ended.

        Returns:
            The checkpoint, or None where the run has none, and a line for each newer one that was
            passed over. The same on every rank.

        Raises:
            UserError: If there are checkpoints and every one of them is damaged.
        """
        self.wait()
        refused: list[str] = []
        # The first rank says what there is: ranks that see other folders must not part ways.
        for step in reversed(self.steps()):
            checkpoint = Checkpoint(self._folder(step), step, self._readers)
            try:
                checkpoint.verify()
            except UserError as error:
                refused.append(str(error))
                self._damaged.add(step)
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
        *,
        asynchronous: bool = False,
    ) -> Checkpoint:
        """Write one checkpoint, then remove those beyond ``keep``.

        Args:
            step: Optimizer steps done.
            model: Parameters and persistent buffers are saved: of a ``DTensor`` what each rank
                holds, of any other tensor one rank's.
            optimizer: Its state is saved by parameter name.
            state: Anything else, as JSON; the first rank's is written.
            asynchronous: Return when this rank's part is copied to host memory, and write in a
                thread. Call ``wait`` before the program ends.

        Returns:
            The checkpoint; with ``asynchronous`` it is there after ``wait``.

        Raises:
            UserError: On every rank, if it, or the one before that was saved asynchronously,
                cannot be written; earlier checkpoints are as they were.
        """
        self.wait()
        parts = [
            plan(model_tensors(model), MODEL, self._writers),
            plan(optimizer_tensors(model, optimizer), OPTIMIZER, self._writers),
        ]
        if asynchronous:
            with self._writers.together():
                parts = [part.on_host() for part in parts]
        saving = Saving(
            parts=parts,
            state={"step": step, **state},
            final=self._folder(step),
            ranks=self._writers,
            last_good=lambda: [str(checkpoint.path) for checkpoint in self._undamaged()],
            then=lambda: self._remove_old(step),
        )
        if asynchronous:
            self._saving = saving
            saving.start()
        else:
            saving.run()
        return Checkpoint(self._folder(step), step, self._readers)

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            UserError: On every rank, if the last asynchronous save failed; once.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.wait()

    def _folder(self, step: int) -> Path:
        return self.path / f"step_{step:08d}"

    def _undamaged(self) -> list[Checkpoint]:
        return [each for each in self.complete() if each.step not in self._damaged]

    def _remove_old(self, saved: int) -> None:
        self._damaged.discard(saved)
        # Damaged ones cannot be continued, so they must not push out one that can; nor must those
        # newer than the one just saved, which were passed over as damaged.
        kept = [each for each in self._undamaged() if each.step <= saved][-self.keep :]
        for old in self.complete():
            if old.step >= kept[0].step:
                break
            # Renamed first: whoever looks meanwhile must not find half of it under its name.
            leaving = self.path / f"{UNFINISHED}{old.path.name}"
            try:
                old.path.rename(leaving)
            except OSError:
                continue
            shutil.rmtree(leaving, ignore_errors=True)


def _fault(file: Path, expected: str) -> str | None:
    """How a file differs from what was written."""
    if not file.is_file():
        return f"{file} is missing"
    if (got := sha256(file)) != expected:
        return f"{file} is corrupt: expected SHA-256 {expected[:16]}..., got {got[:16]}..."
    return None
