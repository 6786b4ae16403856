"""Pickled weights are read as safetensors are, and nothing in them is run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertmesh.cli.convert import main
from expertmesh.convert.opening import open_source
from expertmesh.convert.openmoe import published_config
from expertmesh.convert.pickled import PickledFolder
from expertmesh.convert.published import load_published
from expertmesh.convert.source import SafetensorsFolder
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM
from tests.convert.openmoe import by_hand


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return by_hand.model()


def write(folder: Path, model: DecoderLM, num_files: int = 1) -> Path:
    """As ``save_pretrained`` did before safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(published_config(by_hand.CONFIG)))
    tensors = by_hand.published(model)
    if num_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names = sorted(tensors)
    place: dict[str, str] = {}
    for number in range(num_files):
        file = f"pytorch_model-{number + 1:05d}-of-{num_files:05d}.bin"
        torch.save({name: tensors[name] for name in names[number::num_files]}, folder / file)
        place |= dict.fromkeys(names[number::num_files], file)
    index = {"metadata": {}, "weight_map": place}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_model_is_loaded(tmp_path: Path, model: DecoderLM, num_files: int) -> None:
    folder = write(tmp_path / "model", model, num_files)
    loaded = by_hand.model(seed=1)
    load_published(loaded, folder)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_folder_is_converted(tmp_path: Path, model: DecoderLM) -> None:
    folder = write(tmp_path / "model", model, 2)
    assert main(["openmoe", str(folder), str(tmp_path / "new")]) == 0
    assert isinstance(open_source(tmp_path / "new"), SafetensorsFolder)
    loaded = by_hand.model(seed=1)
    load_published(loaded, tmp_path / "new")
    assert torch.equal(loaded.norm.weight, model.norm.weight)


def test_safetensors_go_first(tmp_path: Path, model: DecoderLM) -> None:
    folder = write(tmp_path / "model", model)
    assert isinstance(open_source(folder), PickledFolder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        open_source(folder)


class Harmful:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": Harmful(tmp_path / "was here")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin cannot be read as pickled tensors"):
        open_source(tmp_path)
    assert not (tmp_path / "was here").exists()


def empty(folder: Path) -> None:
    next(folder.glob("*00002-of*")).write_bytes(b"")


def take_away(folder: Path) -> None:
    next(folder.glob("*00002-of*")).unlink()


def put_a_number(folder: Path) -> None:
    torch.save({"a": 3}, next(folder.glob("*00002-of*")))


def spoil_the_index(folder: Path) -> None:
    (folder / "pytorch_model.bin.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (empty, r"model-00002-of-00003.bin cannot be read as pickled tensors"),
        (take_away, r"model-00002-of-00003.bin is missing; pytorch_model.bin.index.json beside"),
        (put_a_number, r"model-00002-of-00003.bin holds other things than named tensors"),
        (spoil_the_index, r"pytorch_model.bin.index.json is no index of tensors"),
    ],
)
def test_spoiled_folders(
    tmp_path: Path, model: DecoderLM, spoil: Callable[[Path], None], message: str
) -> None:
    folder = write(tmp_path / "model", model, 3)
    spoil(folder)
    with pytest.raises(UserError, match=message):
        open_source(folder)
