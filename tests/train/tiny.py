"""Runs small enough for tests: a few thousand parameters, a few kilobytes of text."""

import json
from pathlib import Path
from typing import Any

from expertmesh.train.config import RunFile
from expertmesh.train.display import Display
from expertmesh.train.loop import Trainer
from expertmesh.train.run_file import parse_run

MODEL: dict[str, Any] = {
    "vocab_size": 258,
    "dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "max_seq_len": 32,
    "dense_hidden": 32,
    "moe_every": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 16,
}


def write_text(path: Path, num_lines: int = 400) -> Path:
    """A file with text that has something to learn."""
    lines = [
        f"{i} bottles and {i * 7 % 11} cups stand on shelf {i % 5}.\n" for i in range(num_lines)
    ]
    path.write_text("".join(lines))
    return path


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    """A run file's content, for a run in ``folder / "run"``."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return {
        "run": {"dir": str(folder / "run"), "device": "cpu", "seed": 7},
        "model": dict(MODEL),
        "data": {"source": str(text), "seq_len": 16, "cache": str(folder / "cache")},
        "train": {"steps": 6, "batch": 4, "log_every": 1, "save_every": 3},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
        "eval": {"every": 3, "batches": 2},
    }


def make_run(folder: Path, *overrides: str) -> RunFile:
    """A checked run."""
    return parse_run(tables(folder), overrides)


class Silent(Display):
    """Remembers instead of printing.

    Attributes:
        losses: Each step's loss.
        entries: Logged metrics.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.entries: list[dict[str, Any]] = []

    def message(self, text: str) -> None:
        return

    def advance(self, step: int, loss: float) -> None:
        self.losses.append(loss)

    def log(self, metrics: Any) -> None:
        self.entries.append(dict(metrics))


def fit(run: RunFile) -> Silent:
    """Train it; what was displayed."""
    display = Silent()
    Trainer(run).fit(display)
    return display


def metrics(run: RunFile) -> list[dict[str, Any]]:
    """Its logged lines."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run: RunFile) -> list[tuple[float, float | None]]:
    """Of training and validation, by line."""
    return [(entry["loss"], entry.get("val_loss")) for entry in metrics(run)]
