"""A run begins with published weights and leaves some, on one process and on a mesh."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expertmesh.convert.published import load_published, read_config
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM
from expertmesh.testing import run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from expertmesh.train.loop import Trainer
from expertmesh.train.run_file import parse_run
from tests.train.tiny import Silent, tables


def content(folder: Path, **train: Any) -> dict[str, Any]:
    """A run of OpenMoE's smallest size over bytes."""
    values = tables(folder)
    values["model"] = {"preset": "openmoe-test", "vocab_size": 258, "max_seq_len": 32}
    values["train"] |= {"steps": 2, "save_every": 0, "save_published": True} | train
    values["eval"] = {"every": 0, "batches": 1}
    return values


def published(folder: Path) -> dict[str, torch.Tensor]:
    model = DecoderLM(read_config(folder))
    load_published(model, folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def trained(values: dict[str, Any]) -> tuple[list[float], Any]:
    """Initial values of the parameters, and the losses after them."""
    trainer = Trainer(parse_run(values))
    begin = pieces(trainer.model.named_parameters())
    display = Silent()
    trainer.fit(display)
    return [entry["loss"] for entry in display.entries], begin


def test_what_a_run_leaves_another_begins_with_on_every_mesh(tmp_path: Path) -> None:
    first = content(tmp_path)
    losses, _ = trained(first)
    folder = tmp_path / "run" / "published"
    weights = published(folder)

    second = content(tmp_path) | {"init": {"from": str(folder)}}
    second["run"] |= {"dir": str(tmp_path / "alone")}
    alone, begin = trained(second)
    begun = assemble([begin])
    assert begun.keys() == weights.keys()
    assert all(torch.equal(begun[name], value) for name, value in weights.items())
    assert alone[0] < losses[0]

    for name, degrees in (("ep", {"ep": 2}), ("pp", {"pp": 2})):
        second["run"] |= {"dir": str(tmp_path / name)}
        views = run_on_ranks(2, trained, second | {"mesh": degrees})
        begun = assemble([view[1] for view in views])
        assert all(torch.equal(begun[key], value) for key, value in weights.items())
        assert views[0][0] == pytest.approx(alone, rel=1e-4)
        left = published(tmp_path / name / "published")
        expected = published(tmp_path / "alone" / "published")
        for key, value in expected.items():
            torch.testing.assert_close(left[key], value, rtol=1e-3, atol=1e-4)


def test_a_run_that_continues_keeps_its_own_weights(tmp_path: Path) -> None:
    trained(content(tmp_path))
    folder = str(tmp_path / "run" / "published")
    again = content(tmp_path, steps=3) | {"init": {"from": folder}}
    again["run"] |= {"dir": str(tmp_path / "second")}
    Trainer(parse_run(again)).fit(Silent())
    before = published(tmp_path / "second" / "published")
    continued = Trainer(parse_run(again))
    assert continued.done
    for name, value in continued.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    trained(content(tmp_path, steps=1))
    other = content(tmp_path) | {"init": {"from": str(tmp_path / "run" / "published")}}
    other["run"] |= {"dir": str(tmp_path / "other")}
    other["model"] |= {"vocab_size": 300}
    with pytest.raises(UserError, match=r"embed_tokens"):
        Trainer(parse_run(other))


@pytest.mark.parametrize("source", ["./nothing", "no-such-folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, source: str) -> None:
    values = content(tmp_path) | {"init": {"from": source}}
    with pytest.raises(UserError, match=rf"init.from must be a folder .*got '{source}'"):
        Trainer(parse_run(values))


def test_a_model_that_nobody_publishes_is_refused_before_training(tmp_path: Path) -> None:
    values = tables(tmp_path)
    values["train"] |= {"save_published": True}
    with pytest.raises(UserError, match=r"train.save_published cannot be had: no family"):
        Trainer(parse_run(values))


@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_the_hub_may_be_pickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    import huggingface_hub

    trained(content(tmp_path, steps=1))
    there, here = tmp_path / "run" / "published", tmp_path / "hub"
    here.mkdir()
    if pickled:
        (file,) = there.glob("*.safetensors")
        torch.save(load_file(file), there / "pytorch_model.bin")
        file.unlink()
    fetched = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/model"
        for pattern in allow_patterns:
            for file in there.glob(pattern):
                shutil.copy(file, here)
                fetched.append(file.name)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    second = content(tmp_path) | {"init": {"from": "someone/model"}}
    second["run"] |= {"dir": str(tmp_path / "second")}
    trainer = Trainer(parse_run(second))
    expected = published(here)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert ("pytorch_model.bin" in fetched) == pickled
