"""The layer beside other libraries' on one GPU, in one process.

    python benchmarks/bench_gpu.py

bfloat16, gated experts, natural routing by a random router over random tokens. For each shape:
forward without gradient; forward and backward with the gradients of the input and of all
parameters; MiB held between the two. Contenders take turns within each round, medians go to
results/bench_gpu.json, where shapes that are not measured again stay as they are. A peer that is
not installed is left out, and the table says so; how to install them stands in ``peers.py``.

This library runs with torch and Triton alone, its router's weight in float32 as it is by default,
and in bfloat16 as the others have theirs. SonicMoE and Liger-Kernel measure candidates when a
shape is new, for minutes. Without ``--tune`` the first gets the one tile that it chose most often
on an H200, the other its own fixed one.
"""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from layer_gpu import (  # beside this file
    BF16,
    SEQUENCE,
    SHAPES,
    Shape,
    Step,
    bmm_steps,
    forward_step,
    make_layer,
    measure_ceilings,
    medians,
    run_all,
    saved_mib,
    training_step,
)
from peers import PEERS
from record import RESULTS, load_if_there, save, stamps_of
from torch import Tensor, nn

NAME = "bench_gpu"
BY_SHAPE = ("shapes", "median_ms", "saved_mib", "missing")
OURS = "expertmesh"
OURS_NARROW = "expertmesh, router in bfloat16"
BMM = "cuBLAS bmm, GEMMs alone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--tune", action="store_true", help="let peers tune themselves")
    parser.add_argument("--dry", action="store_true", help="write nothing: fill caches")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    if not arguments.tune:
        os.environ["LIGER_FUSED_MOE_AUTOTUNE"] = "0"
    torch.manual_seed(0)
    about: dict[str, Any] = {"dtype": "bfloat16", "rounds": arguments.rounds}
    about |= {"tuned": arguments.tune, **measure_ceilings()}
    found: dict[str, dict[str, Any]] = {part: {} for part in BY_SHAPE}
    for name in arguments.shapes:
        found["shapes"][name] = asdict(SHAPES[name])
        measure(name, arguments, found)
        print_shape(name, found)
        if not arguments.dry:  # after each: a peer's tuner may outlast one's patience
            keep(about, found, arguments.results)


def keep(about: dict[str, Any], found: dict[str, dict[str, Any]], folder: Path) -> None:
    """Save beside what is there: another process may measure other shapes on another GPU."""
    old = load_if_there(NAME, folder)
    if old.get("tuned", about["tuned"]) != about["tuned"]:
        old = {}  # one table holds one kind
    rest = [shape for shape in old.get("shapes", {}) if shape not in found["shapes"]]
    merged = {
        part: {shape: row for shape, row in old.get(part, {}).items() if shape in rest} | rows
        for part, rows in found.items()
    }
    ordered = {
        part: {shape: rows[shape] for shape in SHAPES if shape in rows}
        for part, rows in merged.items()
    }
    save(NAME, about | ordered, folder, kept=stamps_of(old, rest))


def measure(name: str, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Add one shape to the results."""
    shape = SHAPES[name]
    x_TD = torch.randn(shape.T, shape.D, device="cuda", dtype=BF16)
    dy_TD = torch.randn_like(x_TD)
    modules, missing = contenders(shape, arguments)
    forward: dict[str, Step] = {}
    both: dict[str, Step] = {}
    saved = {}
    for who, module in modules.items():
        try:
            step, ahead = training_step(module, x_TD, dy_TD), forward_step(module, x_TD)
            step()
            ahead()
            torch.cuda.synchronize()
            saved[who] = saved_mib(module, x_TD)
        except Exception as error:  # a peer that fails on a shape is reported, not fatal
            if who in (OURS, OURS_NARROW):
                raise
            missing[who] = f"failed: {type(error).__name__}: {str(error)[:200]}"
            continue
        forward[who], both[who] = ahead, step
    steps = bmm_steps(shape)
    forward[BMM], both[BMM] = run_all(steps[:2]), run_all(steps)
    results["median_ms"][name] = {
        "forward": medians(forward, arguments.rounds),
        "forward and backward": medians(both, arguments.rounds),
    }
    results["saved_mib"][name], results["missing"][name] = saved, missing


class InSequences(nn.Module):
    """A layer over tokens ``(T, D)`` that stand in sequences, whose length some routers ask for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        y_BSD: Tensor = self.layer(x_TD.unflatten(0, (-1, SEQUENCE)))
        return y_BSD.flatten(0, 1)


def contenders(
    shape: Shape, arguments: argparse.Namespace
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers by name, and why others are not among them."""
    modules: dict[str, nn.Module] = {
        OURS: InSequences(make_layer(shape, "triton")),
        OURS_NARROW: InSequences(make_layer(shape, "triton", router_dtype=BF16)),
    }
    missing = {}
    for peer in arguments.peers:
        try:
            modules[peer] = PEERS[peer](shape, tune=arguments.tune)
        except ImportError as error:
            missing[peer] = f"not installed: {error}"
    return modules, missing


def print_shape(name: str, results: dict[str, Any]) -> None:
    times, saved = results["median_ms"][name], results["saved_mib"][name]
    print(name)
    ours = times["forward and backward"][OURS]
    for who in times["forward"]:
        forward, both = (row[who] for row in times.values())
        mib = f"{saved[who]:6.0f} MiB" if who in saved else " " * 10
        print(f"  {who:30} {forward:8.2f} / {both:8.2f} ms {mib}  {both / ours:5.2f} times ours")
    for who, reason in results["missing"][name].items():
        print(f"  {who:30} {reason}")


if __name__ == "__main__":
    main()
