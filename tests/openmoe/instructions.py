"""A run over a few short instructions, byte by byte."""

import json
from pathlib import Path
from typing import Any

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_records(path: Path, count: int = 40) -> Path:
    """Records of unequal length in the format of Alpaca."""
    records = [
        {
            "instruction": f"Say {WORDS[i % 10]} {1 + i % 3} times.",
            "input": "Slowly." if i % 4 == 0 else "",
            "output": " ".join([WORDS[i % 10]] * (1 + i % 3)),
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tables(folder: Path, *, name: str = "run", strategy: str | None = None) -> dict[str, Any]:
    """The run file of OpenMoE's test size over them, in ``folder / name``."""
    records = folder / "records.jsonl"
    if not records.exists():
        write_records(records)
    return {
        "run": {"dir": str(folder / name), "device": "cpu", "seed": 7},
        "model": {"preset": "openmoe-test", "vocab_size": 258, "max_seq_len": 128},
        "data": {
            "kind": "instructions",
            "source": str(records),
            "seq_len": 64,
            "val_fraction": 0.0,
            "cache": str(folder / "cache"),
        },
        "loss": {"z_loss": 1e-4, "label_smoothing": 0.01},
        "train": {"steps": 6, "batch": 16, "micro_batch": 8, "log_every": 1, "save_every": 0},
        "optim": {"lr": 3e-3, "schedule": "constant", "beta2": 0.999, "weight_decay": 0.0},
        "mesh": {} if strategy is None else {"strategy": strategy},
    }
