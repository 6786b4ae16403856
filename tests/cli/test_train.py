import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertmesh.cli.main import main
from expertmesh.train import toml
from tests.train.tiny import tables


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(toml.dumps(tables(tmp_path)))
    return path


def test_a_run_from_start_to_end_and_again(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_file), "--train.steps=4"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    assert f"folder   {folder}" in out
    assert "step 4/4  loss " in out
    assert "bits per byte" in out
    assert f"weights  {folder / 'checkpoints' / 'step_00000004'}" in out
    (layer,) = json.loads((folder / "expert_tokens.json").read_text())["layers"].values()
    assert len(layer["experts"]) == 4

    assert main(["train", str(folder / "config.toml")]) == 0
    assert "is done: all 4 steps are trained" in capsys.readouterr().out

    assert main(["train", str(folder / "config.toml"), "--train.steps=6"]) == 0
    out = capsys.readouterr().out
    assert "continuing after step 4" in out
    assert "changed since: train.steps: 4 -> 6" in out


def test_a_finished_run_can_be_published_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tables(tmp_path)
    values["model"] = {"preset": "openmoe-test", "vocab_size": 258, "max_seq_len": 32}
    values["eval"] = {"every": 0, "batches": 1}
    (tmp_path / "run.toml").write_text(toml.dumps(values))
    command = ["train", str(tmp_path / "run.toml"), "--train.steps=1"]
    assert main(command) == 0
    folder = tmp_path / "run" / "published"
    assert not folder.exists()
    assert main([*command, "--train.save_published=true"]) == 0
    assert str(folder) in capsys.readouterr().out
    assert (folder / "config.json").exists()
    assert main([*command, "--train.save_published=true"]) == 0
    assert "is done" in capsys.readouterr().out

    # More steps without it: what is there is of the first.
    assert main([*command, "--train.steps=2"]) == 0
    before = (folder / "model.safetensors").read_bytes()
    again = [*command, "--train.steps=2", "--train.save_published=true"]
    assert main(again) == 0
    assert (folder / "model.safetensors").read_bytes() != before
    capsys.readouterr()
    assert main(again) == 0
    assert "is done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.stpes=3", "error: unknown option --train.stpes; did you mean 'train.steps'?"),
        ("--train.steps=x", "error: train.steps: expected an integer, got 'x'"),
        ("--model.experts_per_token=9", "between 1 and num_experts=4, got 9"),
        ("--model.router_options.capacity.factor=0", "got 0"),
        ("--model.router_options.capacity.factor=two", "capacity.factor must be a finite number"),
        ("--model.router_options.capacity=1.25", "capacity must be a table of factor"),
        ("--run.dir=/dev/null/run", "error: /dev/null/run"),
        ("--data.source=/dev/null", "error: /dev/null holds no file"),
        ("--mesh.ep=2", "set ep = 1, or start a multiple of 2 ranks; one process was started"),
        ("--data.source=/nowhere/x.txt", "/nowhere/x.txt"),
        ("--run.device=gpu", "error: run.device"),
        ("--optim.lr=1e30", "set a lower optim.lr"),
    ],
)
def test_a_mistake_is_a_message_and_status_two(
    run_file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["train", str(run_file), "--optim.clip=0", override]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_another_models_checkpoint_is_refused_with_names(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(run_file), "--train.steps=1"]) == 0
    assert main(["train", str(run_file), "--model.num_experts=8"]) == 2
    assert "was saved from another model; " in capsys.readouterr().err


def test_sigterm_saves_and_the_same_command_continues(run_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "expertmesh", "train", str(run_file), "--train.steps=100000"]
    process = subprocess.Popen(
        [*command, "--train.log_every=1", "--eval.every=0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM after step" in out
    assert f"continue with: expertmesh train {tmp_path / 'run' / 'config.toml'}" in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    (newest,) = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1:]
    assert newest.name == f"step_{steps[-1]:08d}"
