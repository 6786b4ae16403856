"""A run's folder as the commands that come after training read it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from expertmesh.data.fetch import Say, say_to_stderr
from expertmesh.errors import UserError
from expertmesh.models.decoder import DecoderLM
from expertmesh.train.build import build_model
from expertmesh.train.checkpoint import CheckpointFolder
from expertmesh.train.config import CONFIG, RunFile
from expertmesh.train.loop import CHECKPOINTS
from expertmesh.train.precision import pick_device
from expertmesh.train.run_file import load_run_file


@dataclass(frozen=True)
class TrainedRun:
    """A model as a run left it.

    Attributes:
        run: The run's configuration, with overrides.
        model: In evaluation mode, with the weights of the newest good checkpoint.
        step: Optimizer steps it was trained for.
        device: Where it is.
    """

    run: RunFile
    model: DecoderLM
    step: int
    device: torch.device


def load_run(
    folder: str | Path, overrides: Sequence[str] = (), *, say: Say = say_to_stderr
) -> TrainedRun:
    """Read a run's folder.

    Args:
        folder: What ``run.dir`` was.
        overrides: ``--section.key=value``, as for training.
        say: Told of each newer checkpoint that is damaged and was passed over.

    Raises:
        UserError: If it is no run's folder, has no usable checkpoint, or its weights do not fit.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} is no run's folder: it has no {CONFIG}; give the folder that "
            "`expertmesh train` printed"
        )
    run = load_run_file(folder / CONFIG, overrides)
    checkpoint, passed_over = CheckpointFolder(folder / CHECKPOINTS).newest_valid()
    if checkpoint is None:
        raise UserError(
            f"{folder} has no checkpoint yet; continue it with: expertmesh train {folder / CONFIG}"
        )
    for note in passed_over:
        say(f"warning: {note}")
    device = pick_device(run.run.device)
    model = build_model(run, device)
    checkpoint.load_model(model)
    model.eval()
    return TrainedRun(run, model, checkpoint.step, device)
