"""The demo's MoE against a dense model of equal active FLOPs: same tokens, same steps, three seeds.

    python benchmarks/moe_vs_dense.py examples/nano.toml

Both models are trained by the run file, once per seed; the seed sets the initial values and the
order of samples, and both models see the same samples in the same order.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from record import save

from expertmesh.data import build_data
from expertmesh.train.config import RunFile
from expertmesh.train.display import make_display
from expertmesh.train.loop import Trainer
from expertmesh.train.run_file import load_run_file

MODELS = ("nano", "nano-dense")


def main() -> None:
    """Train every pair and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the run file's")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        pair = {model: train(arguments, model, seed) for model in MODELS}
        rows.append({"seed": seed, **pair})
        print(row_text(rows[-1]), flush=True)
        path = save("moe_vs_dense", results(rows))  # after each: a run may be cut
    print(f"written to {path}")


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs, and what they say together."""
    differences = [row["nano"]["val_loss"] - row["nano-dense"]["val_loss"] for row in rows]
    return {
        "what": "validation loss (nats per token) after the last step; MoE minus dense, by seed",
        "differences": differences,
        "mean_difference": statistics.mean(differences),
        "moe_lower_on_every_seed": max(differences) < 0,
        "runs": rows,
    }


def train(arguments: argparse.Namespace, model: str, seed: int) -> dict[str, Any]:
    """One run in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"--model.preset={model}", f"--run.dir={folder}/run", f"--run.seed={seed}"]
        if arguments.steps is not None:
            overrides.append(f"--train.steps={arguments.steps}")
        run = load_run_file(arguments.run_file, overrides)
        return fit(run)


def fit(run: RunFile) -> dict[str, Any]:
    """Train and measure."""
    data = build_data(run.data)
    trainer = Trainer(run, data)
    start = time.perf_counter()
    with make_display(run.train.steps) as display:
        outcome = trainer.fit(display)
    assert outcome.evaluation is not None
    return {
        "val_loss": outcome.evaluation.loss,
        "seconds": time.perf_counter() - start,
        "steps": outcome.step,
        "num_params": run.model.num_params,
        "num_active_params": run.model.num_active_params,
        "flops_per_token": run.model.flops_per_token(run.data.seq_len),
    }


def row_text(row: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [f"{name} {row[name]['val_loss']:.4f}" for name in MODELS]
    return f"seed {row['seed']}: " + ", ".join(cells)


if __name__ == "__main__":
    main()
