"""Time, clock, power and energy of a step of the layer and of its products, on one GPU.

    python benchmarks/energy_gpu.py

A GPU at its limit of power lowers its clock until it stays below: then joules decide what a step
takes, and a kernel that is as fast as another when it is timed by itself may cost a step more.
Layers and shapes are those of ``bench_gpu.py``; the products are those of the shipped plan, copies
included, and cuBLAS bmm of equal FLOPs. Each runs alone, and the second half of its time counts:
means go to results/energy_gpu.json, where shapes that are not measured again stay as they are.
"""

import argparse
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench_gpu import contenders  # beside this file
from layer_gpu import BF16, SHAPES, Shape, Step, bmm_steps, training_step
from record import RESULTS, load_if_there, save, stamps_of
from tune_fused import Buffers, steps

from expertmesh.kernels.moe_mlp.fused.plan import plan_for

NAME = "energy_gpu"
PEER = "SonicMoE"
BATCH_MS = 50
Row = dict[str, float]


@dataclass
class Sampler:
    """Clock and power of the first GPU as ``nvidia-smi`` tells them, every 20 ms.

    Attributes:
        samples: When, MHz, watts.
    """

    samples: list[tuple[float, float, float]] = field(default_factory=list)

    def __enter__(self) -> "Sampler":
        identity = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        query = "--query-gpu=clocks.sm,power.draw.instant"
        command = ["nvidia-smi", identity, query, "--format=csv,noheader,nounits", "-lms", "20"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):  # what the driver does not know
                megahertz, watts = map(float, line.split(","))
                self.samples.append((time.monotonic(), megahertz, watts))

    def between(self, start: float, stop: float) -> tuple[float, float]:
        """Mean MHz and watts."""
        inside = [sample[1:] for sample in self.samples if start < sample[0] < stop]
        if not inside:
            raise SystemExit("nvidia-smi tells neither clock nor power of this GPU")
        megahertz, watts = zip(*inside, strict=True)
        return mean(megahertz), mean(watts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each (default 1)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    old = load_if_there(NAME, arguments.results)
    shapes, rows = old.get("shapes", {}), old.get("rows", {})
    with Sampler() as sampler:
        for name in arguments.shapes:
            shapes[name] = asdict(SHAPES[name])
            rows[name] = measure(SHAPES[name], arguments.seconds, sampler)
            print_shape(name, rows[name])
            done = arguments.shapes[: arguments.shapes.index(name) + 1]
            rest = [shape for shape in rows if shape not in done]
            ordered = {
                part: {shape: found[shape] for shape in SHAPES if shape in found}
                for part, found in (("shapes", shapes), ("rows", rows))
            }
            about = {"dtype": "bfloat16", "seconds": arguments.seconds}
            save(NAME, about | ordered, arguments.results, kept=stamps_of(old, rest))


def measure(shape: Shape, seconds: float, sampler: Sampler) -> dict[str, Row]:
    """Every step by its name."""
    x_TD = torch.randn(shape.T, shape.D, device="cuda", dtype=BF16)
    dy_TD = torch.randn_like(x_TD)
    layers, _ = contenders(shape, argparse.Namespace(peers=[PEER], tune=False))
    runs = {f"{who}, step": training_step(layer, x_TD, dy_TD) for who, layer in layers.items()}
    runs |= products(shape)
    names = ("up", "down", "dhidden", "ddown", "dx", "dup")
    runs |= {f"{name}, bmm": run for name, run in zip(names, bmm_steps(shape), strict=True)}
    return {name: one(run, seconds, sampler) for name, run in runs.items()}


def products(shape: Shape) -> dict[str, Step]:
    """This library's products by the plan of the shape."""
    plan = plan_for(
        torch.device("cuda", 0),
        BF16,
        num_experts=shape.E,
        num_assignments=shape.T * shape.K,
        dim=shape.D,
        hidden=shape.F,
        parts=2,
        packed=True,
    )
    known = steps(Buffers.of(shape))

    def run(product: str) -> Step:
        tile: Any = getattr(plan, product)
        copied = product == "ddown" and tile is None  # it shares the copy of the one before
        return lambda: known["ddown, copied" if copied else product][2](tile)

    return {name: run(name) for name in ("up", "down", "dhidden", "ddown", "dx", "dup")}


def one(run: Step, seconds: float, sampler: Sampler) -> Row:
    """What a run takes once clock and power have settled."""
    run()  # what the first call does once is not a part of it
    torch.cuda.synchronize()
    repeats = max(1, round(BATCH_MS / batch_ms(run, 3)))
    start, times = time.monotonic(), []
    while time.monotonic() < start + seconds:
        times.append((time.monotonic(), batch_ms(run, repeats)))
    stop, middle = time.monotonic(), start + seconds / 2
    milliseconds = mean(ms for begun, ms in times if begun > middle)
    megahertz, watts = sampler.between(middle, stop)
    return {
        "ms": round(milliseconds, 4),
        "mhz": round(megahertz),
        "watts": round(watts),
        "joules": round(milliseconds * watts / 1e3, 4),
    }


def batch_ms(run: Step, repeats: int) -> float:
    """Milliseconds of a run out of several in a row."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats


def print_shape(name: str, rows: dict[str, Row]) -> None:
    print(name)
    for who, row in rows.items():
        print(
            f"  {who:40} {row['ms']:8.3f} ms {row['mhz']:6} MHz {row['watts']:5} W "
            f"{row['joules']:8.3f} J"
        )


if __name__ == "__main__":
    main()
