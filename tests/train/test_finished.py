from pathlib import Path

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.train.finished import load_run
from expertmesh.train.loop import Trainer
from tests.train.tiny import Silent, make_run


def test_the_model_is_the_one_that_was_trained(tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path))
    trainer.fit(Silent())
    trained = load_run(tmp_path / "run", ["--eval.batches=1"])
    assert (trained.step, trained.run.eval.batches) == (6, 1)
    assert not trained.model.training
    tokens = torch.arange(8)[None]
    assert torch.equal(trained.model(tokens), trainer.model.eval()(tokens))


def test_a_newer_checkpoint_that_is_damaged_is_named(tmp_path: Path) -> None:
    Trainer(make_run(tmp_path)).fit(Silent())
    damaged = tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes() + b"?")
    said: list[str] = []
    assert load_run(tmp_path / "run", say=said.append).step == 3
    (line,) = said
    assert line.startswith(f"warning: {damaged} is corrupt")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run's folder: it has no config.toml"):
        load_run(tmp_path)
    make_run(tmp_path).save()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load_run(tmp_path / "run")
