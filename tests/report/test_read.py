import json
import math
from pathlib import Path

import numpy as np
import pytest

from expertmesh.errors import UserError
from expertmesh.report.read import read_run
from tests.report.synthetic import read_lines, write_lines, write_run


def test_reads_what_was_logged(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=3, drops=True)
    run = read_run(path)
    metrics, routing = read_lines(path / "metrics.jsonl"), read_lines(path / "routing.jsonl")
    assert run.last_step == 300
    assert run.metrics["loss"].value.tolist() == [record["loss"] for record in metrics]
    evaluated = [record["step"] for record in metrics if "val_loss" in record]
    assert run.metrics["val_loss"].step.tolist() == evaluated
    assert [layer.name for layer in run.routing] == [f"blocks.{i}.moe" for i in range(3)]
    for layer in run.routing:
        logged = [record["layers"][layer.name] for record in routing]
        assert layer.load_SE.tolist() == [entry["load"] for entry in logged]
        assert layer.dropped.tolist() == [entry["dropped"] for entry in logged]
        assert layer.dropped_by_position.shape == (len(routing), 16)
    assert run.config["train"]["steps"] == 300
    assert run.expert_tokens["blocks.0.moe"][1][0].text == "\n"
    assert run.notes == ()


def test_load_over_fair_share(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=1)
    records = [
        {"step": step, "layers": {"moe": {"load": load}}}
        for step, load in enumerate([[4, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 2, 2, 4]])
    ]
    write_lines(path / "routing.jsonl", records)
    (layer,) = read_run(path).routing
    expected = [[4, 0, 0, 0], [1, 1, 1, 1], [math.nan] * 4, [0, 1, 1, 2]]
    np.testing.assert_array_equal(layer.ratio_SE, expected)
    # Fewer than five records: all of them, weighted by their tokens.
    assert layer.num_settled == 4
    np.testing.assert_allclose(layer.settled_E, [5 / 4, 3 / 4, 3 / 4, 5 / 4])
    assert np.isnan(layer.entropy).all()


@pytest.mark.parametrize(("num_steps", "settled"), [(1, 1), (7, 5), (50, 5), (51, 6), (300, 30)])
def test_the_end_of_a_run_is_its_last_tenth(tmp_path: Path, num_steps: int, settled: int) -> None:
    path = write_run(tmp_path / "run", steps=num_steps, every=1, num_layers=1)
    (layer,) = read_run(path).routing
    assert layer.num_settled == settled
    assert layer.settled_steps == f"steps {num_steps - settled + 1} to {num_steps}"


def test_a_run_that_is_still_writing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    whole = read_run(path)
    for name in ("metrics.jsonl", "routing.jsonl"):
        text = (path / name).read_text(encoding="utf-8")
        (path / name).write_text(text[:-25], encoding="utf-8")
    run = read_run(path)
    assert run.last_step == 295
    assert run.metrics["loss"].value.tolist() == whole.metrics["loss"].value.tolist()[:-1]
    assert len(run.routing[0].step) == len(whole.routing[0].step) - 1
    assert run.notes == ()


def test_a_torn_line_in_the_middle_is_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3:5] = [lines[3].rstrip()[:-9] + lines[4]]
    (path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    run = read_run(path)
    assert len(run.metrics["loss"]) == 58
    assert run.notes == ("1 of 59 lines of metrics.jsonl are not readable",)


@pytest.mark.parametrize(
    "layers",
    [
        ["blocks.1.moe"],
        {"blocks.1.moe": [1]},
        {"blocks.1.moe": {"load": 7}},
        {"blocks.1.moe": {"load": [[1], [2]]}},
        {"blocks.1.moe": {"load": [1, None]}},
        {"blocks.1.moe": {"load": [1, 10**400]}},
        {"blocks.1.moe": {"load": [1, 2], "dropped_by_position": True}},
        {"blocks.1.moe": {"load": [1, 2], "dropped_by_position": [{}]}},
    ],
)
def test_a_damaged_line_of_routing_is_counted(tmp_path: Path, layers: object) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    good = {"blocks.1.moe": {"load": [3, 5]}}
    records = [{"step": step, "layers": good} for step in (10, 30)]
    write_lines(path / "routing.jsonl", [records[0], {"step": 20, "layers": layers}, records[1]])
    run = read_run(path)
    assert run.routing[0].step.tolist() == [10, 30]
    assert run.notes == ("1 of 3 lines of routing.jsonl are not readable",)


@pytest.mark.parametrize("step", [10**30, "1", None, 1.5])
def test_a_step_that_is_none_is_counted(tmp_path: Path, step: object) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    records = [{"step": step, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    write_lines(path / "metrics.jsonl", records)
    run = read_run(path)
    assert run.metrics["loss"].value.tolist() == [2.0]
    assert run.notes == ("1 of 2 lines of metrics.jsonl are not readable",)


def test_what_a_resumed_run_wrote_anew_wins(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    old = [{"step": step, "loss": 9.0} for step in range(10, 60, 10)]
    new = [{"step": step, "loss": 1.0} for step in range(30, 50, 10)]
    write_lines(path / "metrics.jsonl", old + new)
    loss = read_run(path).metrics["loss"]
    # Step 50 of the abandoned stretch has not been reached again, and is not part of the run.
    assert loss.step.tolist() == [10, 20, 30, 40]
    assert loss.value.tolist() == [9.0, 9.0, 1.0, 1.0]


def test_a_repeated_step_adds_to_its_record(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    write_lines(
        path / "metrics.jsonl",
        [{"step": 1, "loss": 3.0, "grad_norm": None}, {"step": 1, "loss": 2.0, "val_loss": 4.0}],
    )
    metrics = read_run(path).metrics
    assert {key: series.value.tolist() for key, series in metrics.items()} == {
        "loss": [2.0],
        "val_loss": [4.0],
    }


def test_optional_files_may_be_missing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    for name in ("routing.jsonl", "expert_tokens.json", "config.toml", "samples.txt"):
        (path / name).unlink()
    run = read_run(path)
    assert (run.routing, run.expert_tokens, run.config, run.samples) == ((), {}, {}, "")
    assert run.notes == ()


def test_unreadable_optional_files_are_noted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "expert_tokens.json").write_text(json.dumps({"layers": [1]}), encoding="utf-8")
    (path / "config.toml").write_text("[run", encoding="utf-8")
    tokens, config = read_run(path).notes
    (path / "expert_tokens.json").write_text(
        '{"layers": {"a": {"experts": [[["x", Infinity, 1.0]]]}}}', encoding="utf-8"
    )
    assert read_run(path).notes == (tokens, config)
    assert tokens.startswith("expert_tokens.json is not readable")
    assert config.startswith("config.toml is not valid TOML")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; give the folder .* run\.dir"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        read_run(tmp_path / "file")


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo', "[]\n", '{"loss": 1.0}\n'])
def test_no_metrics(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a logged step .*expertmesh train"):
        read_run(tmp_path)
