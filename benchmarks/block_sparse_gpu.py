"""Experts as block-sparse products beside the grouped backends, on one GPU.

    python benchmarks/block_sparse_gpu.py

bfloat16, gated experts, ids drawn uniformly. For each shape the expert operation forward without
gradient, and forward and backward with the gradients of rows, weights and matrices; backends take
turns within each round; medians, MiB held between the two, and how far y and the gradients are
from the first grouped backend's go to results/block_sparse_gpu.json.

- parts: of ``block_sparse``'s forward pass: the topology, the sampled product, the sparse-dense
  one.
- unequal: experts of widths from half to three halves of the shape's, with the same sum: their
  block-sparse products, and the grouped backends with every expert padded to the widest.

``--tiny`` runs small shapes in float32 on the CPU, in Triton's interpreter, to test the script.
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from layer_gpu import SHAPES, Shape, Step, medians  # beside this file
from record import RESULTS, save
from torch import Tensor
from turns import take_turns

from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.kernels.moe_mlp.block_sparse.rows import pad_rows
from expertmesh.kernels.moe_mlp.block_sparse.topology import BLOCK, make_topology, stacked_columns
from expertmesh.kernels.moe_mlp.block_sparse.unequal import unequal_mlp
from expertmesh.testing import relative_error

GROUPED = ("grouped_mm", "triton")
OURS = "block_sparse"
TINY = {"tiny": Shape(T=20, D=16, F=64, E=2, K=1, router="mixtral")}


def main(argv: list[str] | None = None, folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    bench = Bench(torch.device("cpu" if arguments.tiny else "cuda"), arguments.rounds)
    shapes = TINY if arguments.tiny else {name: SHAPES[name] for name in arguments.shapes}
    results: dict[str, Any] = {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "rounds": arguments.rounds,
        "block": BLOCK,
        "shapes": {name: asdict(shape) for name, shape in shapes.items()},
    }
    for name, shape in shapes.items():
        found = bench.measure(shape)
        for key, value in found.items():
            results.setdefault(key, {})[name] = value
        print_shape(name, found)
        path = save("block_sparse_gpu", results, folder)  # after each: a run may be cut
    print(f"written to {path}")
    return path


class Bench:
    """Where to measure, and how often."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def measure(self, shape: Shape) -> dict[str, Any]:
        """All figures of one shape."""
        operands = self.operands(shape)
        expert_TK = self.ids(shape)
        calls = {who: stacked(operands, expert_TK, who) for who in (*GROUPED, OURS)}
        found = self.times(calls, operands)
        found |= {"saved_mib": self.saved(calls), "relative_error": compare(calls, operands)}
        found["parts_ms"] = self.parts(operands, expert_TK)
        del calls, operands
        found["unequal"] = self.unequal(shape, expert_TK)
        return found

    def times(self, calls: dict[str, Step], operands: list[Tensor]) -> dict[str, Any]:
        forward = {who: without_gradient(call) for who, call in calls.items()}
        both = {who: with_gradients(call, operands) for who, call in calls.items()}
        rows = {"forward": self.clock(forward), "forward and backward": self.clock(both)}
        return {"median_ms": rows}

    def unequal(self, shape: Shape, expert_TK: Tensor) -> dict[str, Any]:
        """Experts of widths from half to three halves of F, spread evenly."""
        widths = spread(shape.F, shape.E)
        hidden = sum(widths)
        x_TD, weight_TK = self.rows(shape)
        up, down = self.normal(2, hidden, shape.D), self.normal(hidden, shape.D)
        operands = leaves(x_TD, weight_TK, up, down)
        ours = {OURS: joined(operands, expert_TK, widths)}
        found = {"widths": [min(widths), max(widths)], **self.times(ours, operands)}
        widest = Shape(shape.T, shape.D, max(widths), shape.E, shape.K, shape.router)
        padded = self.operands(widest)
        calls = {f"{who}, padded": stacked(padded, expert_TK, who) for who in GROUPED}
        for direction, row in self.times(calls, padded)["median_ms"].items():
            found["median_ms"][direction] |= row
        return found

    def parts(self, operands: list[Tensor], expert_TK: Tensor) -> dict[str, float]:
        """The steps of ``block_sparse``'s forward pass, each by itself."""
        from expertmesh.kernels.moe_mlp.block_sparse.products import dsd, sdd

        x_TD, _, up_EPFD, down_EDF = (tensor.detach() for tensor in operands)
        num_experts, hidden = down_EDF.shape[0], down_EDF.shape[2]

        def lay_out() -> tuple[Any, Any]:
            rows = pad_rows(expert_TK, num_experts, BLOCK)
            columns = stacked_columns(num_experts, hidden, BLOCK, self.device)
            return rows, make_topology(rows, columns)

        rows, topology = lay_out()
        x_PD = x_TD[rows.row_P]
        hidden_ZBB = sdd(x_PD, up_EPFD.transpose(0, 1), topology)[:1]
        down_SUD = down_EDF.mT.unsqueeze(0)
        return self.clock(
            {
                "topology": lay_out,
                "gather": lambda: x_TD[rows.row_P],
                "SDD": lambda: sdd(x_PD, up_EPFD.transpose(0, 1), topology),
                "DSD": lambda: dsd(hidden_ZBB, down_SUD, topology),
            }
        )

    def saved(self, calls: dict[str, Step]) -> dict[str, float]:
        """MiB between forward and backward; of a CPU nothing is counted."""
        if self.device.type != "cuda":
            return {}
        found = {}
        for who, call in calls.items():
            before = torch.cuda.memory_allocated()
            y = call()
            found[who] = round((torch.cuda.memory_allocated() - before) / 2**20, 1)
            del y
        return found

    def clock(self, steps: dict[str, Step]) -> dict[str, float]:
        """Median milliseconds."""
        if self.device.type == "cuda":
            return medians(steps, self.rounds)
        times = take_turns(steps, self.rounds, warm=0)
        return {name: round(statistics.median(values), 4) for name, values in times.items()}

    def ids(self, shape: Shape) -> Tensor:
        """K different experts for each token."""
        score_TE = torch.rand(shape.T, shape.E, device=self.device)
        return score_TE.topk(shape.K, dim=1).indices

    def operands(self, shape: Shape) -> list[Tensor]:
        """Rows, combine weights, up and down."""
        up = self.normal(shape.E, 2, shape.F, shape.D)
        down = self.normal(shape.E, shape.D, shape.F)
        return leaves(*self.rows(shape), up, down)

    def rows(self, shape: Shape) -> tuple[Tensor, Tensor]:
        weight_TK = torch.rand(shape.T, shape.K, device=self.device)
        return self.normal(shape.T, shape.D) * shape.D**0.5, weight_TK

    def normal(self, *size: int) -> Tensor:
        """Divided by the root of the last dim, which keeps the size of what passes through."""
        values = torch.randn(*size, device=self.device, dtype=self.dtype)
        return values.mul_(size[-1] ** -0.5)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def spread(hidden: int, num_experts: int) -> list[int]:
    """Multiples of 16 from half to three halves of ``hidden``."""
    steps = max(1, num_experts - 1)
    return [
        max(16, round(hidden * (0.5 + expert / steps) / 16) * 16) for expert in range(num_experts)
    ]


def stacked(operands: list[Tensor], expert_TK: Tensor, backend: str) -> Step:
    x_TD, weight_TK, up, down = operands
    return lambda: moe_mlp(x_TD, expert_TK, weight_TK, up, down, backend=backend)


def joined(operands: list[Tensor], expert_TK: Tensor, widths: list[int]) -> Step:
    x_TD, weight_TK, up, down = operands
    return lambda: unequal_mlp(x_TD, expert_TK, weight_TK, up, down, widths=widths, backend=OURS)


def without_gradient(call: Step) -> Step:
    @torch.no_grad()
    def run() -> object:
        return call()

    return run


def with_gradients(call: Any, operands: list[Tensor]) -> Step:
    def run() -> object:
        y_TD = call()
        return torch.autograd.grad(y_TD, operands, y_TD.detach())

    return run


def compare(calls: dict[str, Step], operands: list[Tensor]) -> dict[str, float]:
    """How far y and each gradient of ``block_sparse`` are from the first grouped backend's."""
    names, values = ("y", "dx", "dweight", "dup", "ddown"), {}
    dy_TD = torch.randn_like(operands[0])
    for who in (GROUPED[0], OURS):
        y_TD: Any = calls[who]()
        values[who] = [y_TD.detach(), *torch.autograd.grad(y_TD, operands, dy_TD)]
    pairs = zip(names, values[OURS], values[GROUPED[0]], strict=True)
    return {name: relative_error(actual, expected) for name, actual, expected in pairs}


def print_shape(name: str, found: dict[str, Any]) -> None:
    print(name)
    for title, times in (("", found["median_ms"]), ("unequal: ", found["unequal"]["median_ms"])):
        for who in times["forward"]:
            forward, both = (row[who] for row in times.values())
            mib = found["saved_mib"].get(who) if not title else None
            held = "" if mib is None else f"{mib:8.0f} MiB"
            print(f"  {title + who:30} {forward:8.2f} / {both:8.2f} ms {held}")
    parts = ", ".join(f"{part} {ms:.2f}" for part, ms in found["parts_ms"].items())
    errors = ", ".join(f"{key} {error:.1e}" for key, error in found["relative_error"].items())
    print(f"  parts of the forward pass, ms: {parts}\n  from {GROUPED[0]}: {errors}")


if __name__ == "__main__":
    main()
