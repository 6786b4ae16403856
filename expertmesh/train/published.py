"""Weights as a model's authors publish them: where a run begins, and what it leaves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from expertmesh.convert.published import family_of_model, load_published, save_published
from expertmesh.data.tokenizer import tokenizer_path
from expertmesh.errors import UserError, require
from expertmesh.models.decoder import DecoderLM
from expertmesh.parallel.agreement import Agreement
from expertmesh.train.config import RunFile
from expertmesh.train.files import write_whole

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh

PUBLISHED = "published"
_RECORD = "published.json"


def check_publishable(run: RunFile) -> None:
    """Refuse, before anything is computed, a model whose weights nobody publishes.

    Raises:
        UserError: If the run is to save them and no family of published models has such a one.
    """
    if run.train.save_published:
        try:
            family_of_model(run.model)
        except UserError as error:
            raise UserError(f"train.save_published cannot be had: {error}") from None


def load_initial(model: nn.Module, source: str, mesh: "Mesh | None") -> None:
    """Give a model published weights in place of random ones; all ranks together.

    Args:
        model: Laid out over ``mesh``.
        source: A folder, or the name of a model on the hub.
        mesh: All processes; None is this one alone.

    Raises:
        UserError: On every rank, if one finds no such folder, or its tensors are not the model's.
    """
    assert isinstance(model, DecoderLM)
    everyone = None if mesh is None else mesh.everyone
    # Each host has its own disk and its own way to the hub.
    with Agreement(everyone).together():
        folder = _folder(source)
    load_published(model, folder, everyone)


def publish(model: nn.Module, run: RunFile, mesh: "Mesh | None", step: int) -> Path:
    """Write ``RUN/published`` and, beside it, of which step it is; all ranks together.

    Raises:
        UserError: On every rank, if it cannot be written.
    """
    assert isinstance(model, DecoderLM)
    folder = run.folder / PUBLISHED
    save_published(
        model,
        folder,
        None if mesh is None else mesh.everyone,
        tokenizer=tokenizer_path(run.data.tokenizer, cache=run.data.cache),
    )
    ranks = Agreement(None if mesh is None else mesh.everyone)
    with ranks.together():
        if ranks.first:
            write_whole(run.folder / _RECORD, json.dumps({"step": step}) + "\n")
    return folder


def is_published(run: RunFile, step: int) -> bool:
    """Whether ``RUN/published`` is there and of this step, not of an earlier one."""
    record = run.folder / _RECORD
    if not ((run.folder / PUBLISHED).is_dir() and record.is_file()):
        return False
    try:
        return bool(json.loads(record.read_text(encoding="utf-8")) == {"step": step})
    except ValueError:
        return False


def _folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"init.from must be a folder of published weights or the name of a model on the hub, "
            f"got {source!r}; set init.from to such a folder"
        )
    try:
        return _downloaded(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"init.from={source!r} is no folder here, and the hub did not give it: "
            f"{str(error).splitlines()[0]}; set init.from to a folder"
        ) from None


def _downloaded(name: str) -> Path:
    """A model of the hub; pickled weights are fetched where there are no others."""
    hub = require("huggingface_hub", extra="hf")
    folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    if not any(folder.glob("*.safetensors")):
        folder = Path(hub.snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    return folder
