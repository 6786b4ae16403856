import math
from pathlib import Path

import numpy as np
import pytest

from expertmesh.models.config import DecoderConfig
from expertmesh.report import summary
from expertmesh.report.read import read_run
from tests.report.synthetic import read_lines, write_lines, write_run


def facts(path: Path) -> dict[str, summary.Fact]:
    return {fact.name: fact for fact in summary.headline(read_run(path))}


def test_headline_equals_the_log(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", drops=True)
    metrics = read_lines(path / "metrics.jsonl")
    shown = facts(path)
    val_loss = metrics[-1]["val_loss"]
    assert shown["steps"].value == "300"
    assert shown["steps"].remark == ""
    assert shown["tokens trained on"].value == "1.23 M"
    assert shown["training loss"].value == f"{metrics[-1]['loss']:.4f}"
    assert shown["validation loss"].value == f"{val_loss:.4f}"
    assert shown["perplexity"].value == f"{math.exp(val_loss):.2f}"
    assert shown["bits per byte"].value == f"{val_loss / math.log(2):.4f}"
    assert shown["bits per byte"].remark == "validation loss / ln 2"
    speed = np.median([record["tokens_per_second"] for record in metrics])
    assert shown["tokens / s"].value == f"{speed:,.0f}"
    assert shown["peak memory"].value == "650 MiB"
    worst = max(record["imbalance"] for record in metrics)
    assert shown["worst load ever"].value == f"{worst:.2f} × fair"
    assert shown["worst load ever"].remark == "at step 5"
    guessed = 0.9 - 0.4 * math.exp(-300 / 60)
    assert shown["told by token id"].value == f"{100 * guessed:.1f} %"
    remark = "first choices, blocks.0.moe; 12.5 % by one guess for all"
    assert shown["told by token id"].remark == remark


def test_bits_per_byte_as_logged(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    write_lines(path / "metrics.jsonl", [{"step": 1, "val_loss": 2.0, "val_bits_per_byte": 1.125}])
    assert facts(path)["bits per byte"].value == "1.1250"
    (path / "config.toml").unlink()
    write_lines(path / "metrics.jsonl", [{"step": 1, "val_loss": 2.0}])
    assert "bits per byte" not in facts(path)


def test_dropped_is_the_share_of_all_assignments(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=1)
    layers = [{"load": [6, 4], "dropped": 0.5}, {"load": [30, 60], "dropped": 0.1}]
    records = [{"step": 1 + step, "layers": {"moe": layer}} for step, layer in enumerate(layers)]
    write_lines(path / "routing.jsonl", records)
    assert facts(path)["dropped"].value == "14.0 %"
    del layers[0]["dropped"], layers[1]["dropped"]
    write_lines(path / "routing.jsonl", records)
    assert "dropped" not in facts(path)


def test_worst_load_is_the_largest_of_the_last_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=2)
    records = read_lines(path / "routing.jsonl")
    for record in records[-6:]:
        record["layers"]["blocks.1.moe"]["load"] = [1, 1, 1, 1, 1, 9, 1, 1]
    write_lines(path / "routing.jsonl", records)
    fact = facts(path)["worst load"]
    assert fact.value == "4.50 × fair"
    assert fact.remark == "at the end: blocks.1.moe, expert 5"


def test_parameters_come_from_the_configured_model(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=10)
    run = read_run(path)
    model = DecoderConfig(**run.config["model"])
    fact = facts(path)["parameters"]
    assert fact.value == summary.quantity(model.num_params)
    assert fact.remark == f"{summary.quantity(model.num_active_params)} active per token"
    (path / "config.toml").write_text("[model]\nof_another_kind = 1\n", encoding="utf-8")
    assert "parameters" not in facts(path)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    write_lines(path / "metrics.jsonl", read_lines(path / "metrics.jsonl")[:-4])
    assert facts(path)["steps"].remark == "of 300: not finished"


@pytest.mark.parametrize("seconds", [math.inf, math.nan])
def test_a_time_that_is_no_number_is_left_out(tmp_path: Path, seconds: float) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    write_lines(path / "metrics.jsonl", [{"step": 1, "tokens": 16, "seconds": seconds}])
    assert facts(path)["tokens trained on"] == summary.Fact("tokens trained on", "16")


def test_best_validation_loss_is_named_if_it_is_not_the_last(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    losses = [(10, 2.0), (20, 1.25), (30, 1.5)]
    write_lines(path / "metrics.jsonl", [{"step": s, "val_loss": v} for s, v in losses])
    assert facts(path)["validation loss"].remark.endswith("best 1.2500 at step 20")


def test_layer_balance(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=1)
    layer = {"load": [0, 2, 4, 2], "entropy": 1.25, "dropped": 0.125}
    write_lines(path / "routing.jsonl", [{"step": 1, "layers": {"moe": layer}}])
    row = summary.layer_balance(read_run(path).routing[0])
    assert row.cv == pytest.approx(math.sqrt(0.5))
    assert row == summary.LayerBalance(
        name="moe",
        num_experts=4,
        max_over_fair=2.0,
        min_over_fair=0.0,
        cv=row.cv,
        num_dead=1,
        entropy=1.25,
        dropped=0.125,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (12_300, "12,300"), (1_234_567, "1.23 M"), (46.7e9, "46.7 B")],
)
def test_quantity(value: float, text: str) -> None:
    assert summary.quantity(value) == text


def test_percent_never_rounds_a_drop_to_none() -> None:
    assert [summary.percent(share) for share in (0.0, 0.00004, 0.0123, 1.0)] == [
        "0 %",
        "0.004 %",
        "1.2 %",
        "100.0 %",
    ]


def test_duration() -> None:
    assert [summary.duration(seconds) for seconds in (5.2, 185.0, 7260.0)] == [
        "5 s",
        "3 min 05 s",
        "2 h 01 min",
    ]
