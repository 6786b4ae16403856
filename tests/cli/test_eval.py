import json
from pathlib import Path

import pytest

from expertmesh.cli.main import main
from expertmesh.train.loop import Trainer
from tests.train.tiny import Silent, make_run, write_text


def test_eval_repeats_the_last_validation_loss_and_shows_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    Trainer(run).fit(Silent())
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert main(["eval", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert f"loss           {last['val_loss']:.4f} nats per token" in out
    assert "perplexity " in out
    assert "bits per byte " in out
    (line,) = [line for line in out.splitlines() if line.startswith("blocks.")]
    assert sum(float(load) for load in line.split()[-4:]) == pytest.approx(4.0, abs=0.03)


def test_other_text_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    Trainer(run).fit(Silent())
    other = write_text(tmp_path / "other.txt", 50)
    assert main(["eval", str(run.folder), f"--data.source={other}", "--eval.batches=none"]) == 0
    assert "loss " in capsys.readouterr().out


def test_edited_text_is_no_held_out_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "--train.steps=1", "--data.val_fraction=0.1")
    Trainer(run).fit(Silent())
    command = ["eval", str(run.folder)]
    assert main([*command, "--data.val_fraction=0.05"]) == 0
    assert main([*command, "--data.val_fraction=0.2"]) == 2
    assert "must be at most 0.1, got 0.2: " in capsys.readouterr().err
    write_text(tmp_path / "text.txt", 300)
    assert main(command) == 2
    assert "was begun with other data: " in capsys.readouterr().err
    source = f"--data.source={tmp_path / 'text.txt'}"
    assert main([*command, source, "--data.val_fraction=0.5"]) == 0
    assert capsys.readouterr().err == ""


def test_mistakes_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err
    run = make_run(tmp_path)
    Trainer(run).fit(Silent())
    assert main(["eval", str(run.folder), "--data.val_fraction=0"]) == 2
    assert "nothing is held out" in capsys.readouterr().err
    assert main(["eval", str(run.folder), "--model.dim=32"]) == 2
    assert "was saved from another model" in capsys.readouterr().err
