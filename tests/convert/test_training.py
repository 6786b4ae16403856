"""What a training run left, into a published folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.cli.convert import main
from expertmesh.convert.published import load_published, read_config
from expertmesh.convert.training import TrainingCheckpoint
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.testing.ranks import run_on_ranks
from expertmesh.train.checkpoint import CheckpointFolder
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.run_file import parse_run
from tests.convert.openmoe import by_hand, meshes
from tests.openmoe.vocabulary import write_small
from tests.train.tiny import tables


def save(folder: Path, degrees: dict[str, int]) -> None:
    """A checkpoint of step 3, by several ranks."""
    model, mesh = meshes.placed(3, degrees, by_hand.CONFIG)
    model.to_empty(device="cpu")
    model.init_weights(5)
    optimizer = build_optimizer(model, OptimConfig())
    CheckpointFolder(folder, group=mesh.everyone).save(3, model, optimizer, {})


def run_folder(path: Path, tokenizer: str = "byte") -> tuple[Path, DecoderConfig]:
    """A run's folder without a checkpoint, and its model."""
    content: dict[str, Any] = tables(path) | {
        "model": {"preset": "openmoe-test", "vocab_size": 258}
    }
    content["model"] |= {"max_seq_len": 32}
    content["data"] |= {"tokenizer": tokenizer}
    run = parse_run(content)
    run.folder.mkdir()
    run.save()
    return run.folder, run.model


@pytest.mark.parametrize(("world", "degrees"), [(1, {}), (4, {"ep": 2})])
def test_whoever_saved_it(tmp_path: Path, world: int, degrees: dict[str, int]) -> None:
    run_on_ranks(world, save, tmp_path, degrees)
    source = TrainingCheckpoint(tmp_path / "step_00000003")
    expected = DecoderLM(by_hand.CONFIG, seed=5).state_dict()
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        whole = Box.whole(tuple(tensor.shape))
        assert torch.equal(source.read(name, whole), tensor)
        inner = Box(tuple(size // 3 for size in whole.stop), whole.stop)
        assert torch.equal(source.read(name, inner), tensor[inner.within(whole)])


def test_a_run_becomes_a_published_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = run_folder(tmp_path)
    with pytest.raises(UserError, match=r"run has no checkpoint yet"):
        main(["openmoe", str(folder), str(tmp_path / "out")])
    model = DecoderLM(config, seed=2)
    optimizer = build_optimizer(model, OptimConfig())
    CheckpointFolder(folder / "checkpoints").save(7, model, optimizer, {})
    assert main(["openmoe", str(folder), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert main(["openmoe", str(folder), str(tmp_path / "out"), "--verify"]) == 0
    assert "step_00000007: training checkpoint, " in capsys.readouterr().out
    loaded = DecoderLM(read_config(tmp_path / "out"))
    load_published(loaded, tmp_path / "out")
    expected = model.bfloat16().state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.bfloat16(), expected[name]), name


def test_the_runs_tokenizer_goes_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "words").mkdir()
    words = write_small(tmp_path / "words")
    folder, config = run_folder(tmp_path, tokenizer=str(words))
    model = DecoderLM(config, seed=2)
    optimizer = build_optimizer(model, OptimConfig())
    CheckpointFolder(folder / "checkpoints").save(7, model, optimizer, {})
    assert main(["openmoe", str(folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "spiece.model").read_bytes() == words.read_bytes()

    def offline(*_: Any, **__: Any) -> Path:
        raise UserError("no way out")

    monkeypatch.setattr("expertmesh.data.tokenizer.tokenizer_path", offline)
    assert main(["openmoe", str(folder), str(tmp_path / "without")]) == 0
    assert "no way out; --tokenizer PATH gives one" in capsys.readouterr().out
    assert not (tmp_path / "without" / "spiece.model").exists()
