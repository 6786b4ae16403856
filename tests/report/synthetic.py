"""Writes the folder of a run that never was, with numbers that a test can recompute."""

import json
import math
import random
from pathlib import Path
from typing import Any

CONFIG = """\
[run]
dir = "runs/<b>made up</b>"

[train]
steps = {steps}

[data]
tokenizer = "byte"

[model]
vocab_size = 256
dim = 32
num_layers = 4
num_heads = 4
num_experts = 8
experts_per_token = 2
expert_hidden = 48
"""

TOKENS = [
    " the",
    "\n",
    "<script>alert(1)</script>",
    "größe",
    "日本",
    "\t",
    "&amp;",
    "\u202e",
    "'\"",
]


def metrics_record(step: int, *, generator: random.Random) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": step,
        "loss": 1.4 + 4.1 * math.exp(-step / 60) + generator.gauss(0.0, 0.04),
        "lr": 3e-3 * min(1.0, step / 30),
        "grad_norm": 0.6 + 2.0 * math.exp(-step / 25) + abs(generator.gauss(0.0, 0.1)),
        "tokens_per_second": 21_000.0 + generator.gauss(0.0, 700.0),
        "memory_mib": 610.0 + min(step, 40),
        "tokens": step * 4096,
        "seconds": step * 0.2,
    }
    if step % 50 == 0:
        record["val_loss"] = 1.5 + 4.0 * math.exp(-step / 60)
    return record


def layer_record(
    step: int, depth: int, *, num_experts: int, drops: bool, generator: random.Random
) -> dict[str, Any]:
    spread = 0.06 + 0.5 * math.exp(-step / 50)
    tilt = [spread * math.sin(depth + 2.3 * expert) for expert in range(num_experts)]
    load = [round(1024 * math.exp(value + generator.gauss(0.0, 0.04))) for value in tilt]
    record: dict[str, Any] = {}
    if step % 50 == 0:
        settled = [(token + (step < 200 and token % 3 == 0)) % num_experts for token in range(40)]
        record["by_token"] = {
            "guessed": 0.9 - 0.4 * math.exp(-step / 60) - 0.1 * depth,
            "unguided": 1 / num_experts,
            "ids": list(range(40)),
            "favourite": settled,
        }
    late = [0.004 * bin / (1 + depth) if drops else 0.0 for bin in range(16)]
    return record | {
        "load": load,
        "dropped": sum(late) / 16 * (1 + math.exp(-step / 50)),
        "dropped_by_position": late,
        "entropy": math.log(num_experts) * (0.55 + 0.4 * math.exp(-step / 80)) - 0.05 * depth,
        "max_logit": 1.0 + 0.8 * math.log1p(step) + 0.2 * depth,
    }


def write_run(
    path: Path,
    *,
    steps: int = 300,
    every: int = 5,
    num_layers: int = 2,
    num_experts: int = 8,
    drops: bool = False,
) -> Path:
    """Write a finished run; ``num_layers=0`` is a dense model."""
    generator = random.Random(0)
    path.mkdir(parents=True)
    (path / "config.toml").write_text(CONFIG.format(steps=steps), encoding="utf-8")
    names = [f"blocks.{depth}.moe" for depth in range(num_layers)]
    metrics, routing = [], []
    for step in range(every, steps + 1, every):
        metrics.append(metrics_record(step, generator=generator))
        if num_layers:
            balance = {"imbalance": 1.2 + math.exp(-step / 40), "dropped": 0.02 if drops else 0.0}
            metrics[-1] |= balance
        layers = {
            name: layer_record(
                step, depth, num_experts=num_experts, drops=drops, generator=generator
            )
            for depth, name in enumerate(names)
        }
        routing.append({"step": step, "layers": layers})
    write_lines(path / "metrics.jsonl", metrics)
    (path / "samples.txt").write_text("To be, or <i>not</i>\n\tto be & so on", encoding="utf-8")
    if num_layers:
        write_lines(path / "routing.jsonl", routing)
        write_expert_tokens(path, names, num_experts)
    return path


def write_expert_tokens(path: Path, names: list[str], num_experts: int) -> None:
    taken = [
        [[TOKENS[(expert + i) % len(TOKENS)], 900 - 10 * i, 4.5 - 0.3 * i] for i in range(9)]
        for expert in range(num_experts)
    ]
    layers = {name: {"experts": taken} for name in names}
    (path / "expert_tokens.json").write_text(json.dumps({"layers": layers}), encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
