"""The kernels of the layer's step one by one, beside SonicMoE's, on one GPU.

    python benchmarks/products_gpu.py

Layers, shapes and steps are those of ``bench_gpu.py``. They take turns under torch's profiler: each
repeats its step for as long as ``layer_gpu.py`` lets one run in, so that the clock is its own, and
the last counts. Of every kernel the median over the rounds, in the order of their start, goes to
results/products_gpu.json, where shapes that are not measured again stay as they are. SonicMoE's
products are QuACK's with one fixed tile.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from bench_gpu import contenders  # beside this file
from layer_gpu import BF16, RUN_IN_MS, SHAPES, Shape, training_step
from record import RESULTS, load_if_there, save, stamps_of
from torch.profiler import ProfilerActivity, profile

NAME = "products_gpu"
PEER = "SonicMoE"
LONG = 0.02
"""Kernels that take this share of a step are printed."""

Kernels = list[tuple[str, float]]
"""Name and milliseconds, in order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    old = load_if_there(NAME, arguments.results)
    shapes, kernels = old.get("shapes", {}), old.get("kernels", {})
    for name in arguments.shapes:
        shapes[name] = asdict(SHAPES[name])
        kernels[name] = measure(SHAPES[name], arguments.rounds)
        print_shape(name, kernels[name])
        done = arguments.shapes[: arguments.shapes.index(name) + 1]
        rest = [shape for shape in kernels if shape not in done]
        results = {"dtype": "bfloat16", "rounds": arguments.rounds}
        ordered = {
            part: {shape: rows[shape] for shape in SHAPES if shape in rows}
            for part, rows in (("shapes", shapes), ("kernels", kernels))
        }
        save(NAME, results | ordered, arguments.results, kept=stamps_of(old, rest))


def measure(shape: Shape, rounds: int) -> dict[str, Kernels]:
    """Kernels of a step of each layer that is installed."""
    x_TD = torch.randn(shape.T, shape.D, device="cuda", dtype=BF16)
    dy_TD = torch.randn_like(x_TD)
    layers, _ = contenders(shape, argparse.Namespace(peers=[PEER], tune=False))
    steps = {who: training_step(layer, x_TD, dy_TD) for who, layer in layers.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    repeats = {
        who: math.ceil(RUN_IN_MS / total(kernels_of(step, 3))) for who, step in steps.items()
    }
    seen: dict[str, list[Kernels]] = {who: [] for who in steps}
    for _ in range(rounds):
        for who, step in steps.items():
            seen[who].append(kernels_of(step, repeats[who]))
    return {who: middle(found) for who, found in seen.items()}


def kernels_of(step: Callable[[], object], repeats: int) -> Kernels:
    """What runs on the device in the last of so many steps; each runs the same kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    on_device = (e for e in profiler.events() if e.device_type.name == "CUDA")
    ordered = sorted(on_device, key=lambda event: event.time_range.start)
    if len(ordered) % repeats:
        print(f"  {len(ordered)} kernels of {repeats} steps: not all steps run the same")
    last = ordered[-(len(ordered) // repeats) :]
    return [(event.name[:160], event.time_range.elapsed_us() / 1e3) for event in last]


def total(kernels: Kernels) -> float:
    """Milliseconds of all."""
    return sum(milliseconds for _, milliseconds in kernels)


def middle(rounds: list[Kernels]) -> Kernels:
    """The medians of kernels that ran in every round, by their place among those of one name."""
    times: list[dict[tuple[str, int], float]] = []
    for kernels in rounds:
        count: dict[str, int] = {}
        times.append({})
        for name, milliseconds in kernels:
            count[name] = count.get(name, 0) + 1
            times[-1][name, count[name]] = milliseconds
    return [
        (key[0], round(statistics.median(row[key] for row in times), 4))
        for key in times[0]
        if all(key in row for row in times)
    ]


def print_shape(name: str, found: dict[str, Kernels]) -> None:
    print(name)
    for who, kernels in found.items():
        print(f"  {who}: {total(kernels):.2f} ms in {len(kernels)} kernels")
        for kernel, milliseconds in kernels:
            if milliseconds >= LONG * total(kernels):
                print(f"  {milliseconds:8.3f} ms  {kernel[:90]}")


if __name__ == "__main__":
    main()
