import hashlib
import json
import resource
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from expertmesh.errors import UserError
from expertmesh.train.checkpoint import Checkpoint, CheckpointFolder
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.tensors import model_tensors, optimizer_tensors


def trained(width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(width, 2)
    optimizer = build_optimizer(model, OptimConfig())
    model(torch.randn(5, width)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_newest_is_found_and_older_ones_are_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.newest_valid() == (None, [])
    for step in (9, 10, 100_000_000):
        folder.save(step, *trained(), {"tokens": step})
    assert [checkpoint.step for checkpoint in folder.complete()] == [10, 100_000_000]
    newest, refused = folder.newest_valid()
    assert newest is not None
    assert newest.state() == {"step": 100_000_000, "tokens": 100_000_000}
    assert refused == []


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    model, optimizer = trained()
    checkpoint = folder.save(1, model, optimizer, {})
    other, other_optimizer = trained()
    checkpoint.load_model(other)
    checkpoint.load_optimizer(other, other_optimizer)
    assert torch.equal(other.weight, model.weight)  # type: ignore[arg-type]  # Linear's weight
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_what_was_saved_before_the_first_step_is_loaded(
    tmp_path: Path, name: Literal["adamw", "adafactor"]
) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        return model, build_optimizer(model, OptimConfig(name=name))

    folder = CheckpointFolder(tmp_path)
    folder.save(1, *made(), {})
    checkpoint, _ = folder.newest_valid()
    assert checkpoint is not None
    model, optimizer = made()
    checkpoint.load_model(model)
    checkpoint.load_optimizer(model, optimizer)
    assert not optimizer.state
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_half_written_folder_is_never_used_and_is_cleared(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(5, *trained(), {})
    left_over = tmp_path / ".unfinished-step_00000010"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    assert [checkpoint.step for checkpoint in folder.complete()] == [5]
    folder.save(10, *trained(), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000005", "step_00000010"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_corrupt_file_is_named_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, *trained(), {})
    broken = folder.save(2, *trained(), {}).path / name
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    newest, refused = folder.newest_valid()
    assert newest is not None
    assert newest.step == 1
    assert f"{broken} is corrupt: expected SHA-256" in refused[0]


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.save(1, *trained(), {}).path / name).unlink()
    with pytest.raises(UserError, match=rf"no usable checkpoint: .*{name}"):
        folder.newest_valid()


def test_a_manifest_without_hashes_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    with pytest.raises(UserError, match=r"manifest.json has no hash of .*model.safetensors"):
        Checkpoint(tmp_path, 1).verify()


def test_a_file_with_a_checkpoints_name_is_none(tmp_path: Path) -> None:
    (tmp_path / "step_00000009").write_text("x")
    assert CheckpointFolder(tmp_path).newest_valid() == (None, [])


def test_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    good = folder.save(1, *trained(), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError) as error:
            folder.save(2, *trained(width=20_000), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not save the checkpoint of step 2" in str(error.value)
    assert f"the last good one is {good.path}" in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [good.path.name]
    good.verify()


def test_disk_full_at_the_last_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    folder = CheckpointFolder(tmp_path)
    monkeypatch.setattr("expertmesh.train.saving.write_json", no_space)
    with pytest.raises(UserError, match="No space left on device; there is no earlier one"):
        folder.save(1, *trained(), {})
    assert list(tmp_path.iterdir()) == []


def test_same_step_is_replaced(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(1, *trained(), {"try": 1})
    folder.save(1, *trained(), {"try": 2})
    assert [checkpoint.state()["try"] for checkpoint in folder.complete()] == [2]


def test_one_that_is_replaced_stays_until_the_other_is_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCut(BaseException):
        pass

    def no_power(*args: object, **options: object) -> None:
        raise PowerCut

    folder = CheckpointFolder(tmp_path)
    folder.save(1, *trained(), {"try": 1})
    with monkeypatch.context() as patch:
        patch.setattr("expertmesh.train.saving.shutil.rmtree", no_power)
        with pytest.raises(PowerCut):
            folder.save(1, *trained(), {"try": 2})
    newest, _ = CheckpointFolder(tmp_path).newest_valid()
    assert newest is not None
    assert newest.state()["try"] == 2
    folder.save(2, *trained(), {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_files_are_tensors_and_json_only(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(3, *trained(), {"tokens": 4}).path
    names = {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert {entry.name for entry in path.iterdir()} == names
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == names - {
        "manifest.json"
    }


def test_a_save_in_a_thread_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    model, optimizer = trained()
    weight = model.weight.detach().clone()  # type: ignore[operator]  # Linear's weight
    checkpoint = folder.save(1, model, optimizer, {}, asynchronous=True)
    nn.init.zeros_(model.weight)  # type: ignore[arg-type]  # Linear's weight
    folder.wait()
    folder.wait()
    checkpoint.verify()
    checkpoint.load_model(model)
    assert torch.equal(model.weight, weight)  # type: ignore[arg-type]  # Linear's weight


def test_a_save_in_a_thread_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    folder = CheckpointFolder(tmp_path)
    monkeypatch.setattr("expertmesh.train.saving.write_json", no_space)
    folder.save(1, *trained(), {}, asynchronous=True)
    with pytest.raises(UserError, match="could not save the checkpoint of step 1"):
        folder.save(2, *trained(), {})
    monkeypatch.undo()
    folder.save(2, *trained(), {})
    assert [checkpoint.step for checkpoint in folder.complete()] == [2]


def test_damaged_newer_ones_do_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    (folder.save(9, *trained(), {}).path / "state.json").unlink()
    folder.save(7, *trained(), {})
    newest, refused = folder.newest_valid()
    assert newest is not None
    assert newest.step == 7
    assert "step_00000009/state.json is missing" in refused[0]


def steps_of(folder: CheckpointFolder) -> list[int]:
    return [checkpoint.step for checkpoint in folder.complete()]


def test_damaged_older_ones_do_not_push_out_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(100, *trained(), {})
    (folder.save(137, *trained(), {}).path / "state.json").unlink()
    newest, _ = folder.newest_valid()
    assert newest is not None
    assert newest.step == 100

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("expertmesh.train.saving.write_json", no_space)
        with pytest.raises(UserError, match=r"the last good one is .*/step_00000100;"):
            folder.save(150, *trained(), {})
    folder.save(200, *trained(), {})
    assert steps_of(folder) == [100, 137, 200]
    folder.save(300, *trained(), {})
    assert steps_of(folder) == [200, 300]


def test_a_damaged_one_that_is_saved_again_counts(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(100, *trained(), {})
    (folder.save(137, *trained(), {}).path / "state.json").unlink()
    folder.newest_valid()
    folder.save(137, *trained(), {})
    folder.save(200, *trained(), {})
    assert steps_of(folder) == [137, 200]


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = tmp_path / "step_00000004"
    folder.mkdir()
    save_file(model_tensors(model), folder / "model.safetensors")
    save_file(optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
    (folder / "state.json").write_text('{"step": 4}')
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "manifest.json").write_text(json.dumps({"files": hashes}))
    other, other_optimizer = trained()
    newest, _ = CheckpointFolder(tmp_path).newest_valid()
    assert newest is not None
    newest.load_model(other)
    newest.load_optimizer(other, other_optimizer)
    found = {**model_tensors(other), **optimizer_tensors(other, other_optimizer)}
    for name, tensor in {**model_tensors(model), **optimizer_tensors(model, optimizer)}.items():
        assert torch.equal(found[name], tensor), name
