import json
from pathlib import Path

import pytest

from expertmesh.errors import MissingDependency
from expertmesh.train import logger as module
from expertmesh.train.logger import RunLogger


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_the_resumed_step_are_written_again(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    for step in (1, 2, 3):
        logger.log({"step": step, "loss": 0.1 + 0.2}, {"moe": {"load": [1, 2]}})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    logger = RunLogger(tmp_path, after=2)
    logger.log({"step": 3, "loss": 1.0}, {})
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert steps(tmp_path / "routing.jsonl") == [1, 2]
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == 0.1 + 0.2


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    metrics.unlink()
    metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space.*start the same command again.*metrics\.jsonl"):
        logger.log({"step": 1}, {})


def test_lines_that_are_no_entry_are_left_out(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', "torn", "5", "{}", '{"step": 2, "loss": 1.0}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    RunLogger(tmp_path, after=9)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]


def test_tensorboard_events_hold_every_number(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, tensorboard=True)
    logger.log({"step": 7, "loss": 2.5}, {})
    logger.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.5)]


def test_missing_tensorboard_is_said_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *, extra: str) -> None:
        raise MissingDependency(f"pip install 'expertmesh[{extra}]'")

    monkeypatch.setattr(module, "require", missing)
    with pytest.raises(MissingDependency, match=r"pip install 'expertmesh\[report\]'"):
        RunLogger(tmp_path, tensorboard=True)
