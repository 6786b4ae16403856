"""OpenMoE laid out over meshes, for tests of what is loaded and saved."""

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.convert.folder import ShardWriter
from expertmesh.convert.published import load_published, save_published
from expertmesh.convert.source import SafetensorsFolder
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import shard_of
from tests.convert.openmoe import by_hand
from tests.parallel.cuts import whole


def placed(zero: int, degrees: dict[str, Any], config: DecoderConfig) -> tuple[DecoderLM, Mesh]:
    """A model without values."""
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = DecoderLM(config)
    if mesh.degree("pp") > 1:
        keep_stages(model, Stages.of(config, mesh.degree("pp")), mesh.coordinates["pp"])
    return parallelize(model, mesh, zero=zero), mesh


def load(
    folder: Path, zero: int, degrees: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], float]:
    """The loaded values as ranks have them, and the elements read for each that is held here."""
    model, mesh = placed(zero, degrees, by_hand.CONFIG)
    num_read = 0
    read = SafetensorsFolder.read

    def counted(source: SafetensorsFolder, name: str, box: Box) -> Tensor:
        nonlocal num_read
        num_read += box.num_elements
        return read(source, name, box)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsFolder, "read", counted)
        load_published(model.to(dtype), folder, mesh.everyone, device="cpu")
    state = model.state_dict()
    held = sum(shard_of(tensor).local.numel() for tensor in state.values())
    return {name: whole(tensor) for name, tensor in state.items()}, num_read / held


def save(folder: Path, source: Path, zero: int, degrees: dict[str, Any], shard_bytes: int) -> None:
    """Load on a mesh and save from it."""
    model, mesh = placed(zero, degrees, by_hand.CONFIG)
    load_published(model, source, mesh.everyone, device="cpu")
    save_published(model, folder, mesh.everyone, shard_bytes=shard_bytes)


def load_into_another(folder: Path, degrees: dict[str, Any]) -> str:
    """The error of a model with other widths."""
    config = dataclasses.replace(by_hand.CONFIG, dense_hidden=96, expert_hidden=96)
    model, mesh = placed(2, degrees, config)
    try:
        load_published(model, folder, mesh.everyone)
    except UserError as error:
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        return str(error)
    return ""


def load_where_one_finds_nothing(folder: Path, nothing: Path) -> str:
    """What every rank hears where rank 1's disk lacks the folder."""
    model, mesh = placed(2, {"ep": 2}, by_hand.CONFIG)
    with pytest.raises(UserError) as caught:
        load_published(model, nothing if mesh.rank else folder, mesh.everyone)
    return str(caught.value)


def save_where_one_has_no_tokenizer(source: Path, parent: Path) -> str:
    """The same where it lacks the tokenizer."""
    model, mesh = placed(2, {"ep": 2}, by_hand.CONFIG)
    load_published(model, source, mesh.everyone, device="cpu")
    tokenizer = parent / "tokenizer"
    if mesh.rank == 0:
        tokenizer.mkdir()
        (tokenizer / "spiece.model").write_text("pieces")
    there = tokenizer if mesh.rank == 0 else parent / "gone"
    with pytest.raises(UserError) as caught:
        save_published(model, parent / "saved", mesh.everyone, tokenizer=there)
    return str(caught.value)


def disk_full_on_one(folder: Path, source: Path) -> str:
    """Rank 1 cannot write; what every rank hears."""
    model, mesh = placed(3, {"ep": 2}, by_hand.CONFIG)
    load_published(model, source, mesh.everyone, device="cpu")

    def full(writer: ShardWriter, values: Tensor) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if mesh.rank == 1:
        pytest.MonkeyPatch().setattr(ShardWriter, "write", full)
    with pytest.raises(UserError) as caught:
        save_published(model, folder, mesh.everyone, shard_bytes=100_000)
    return str(caught.value)
