"""Time the candidate tiles of each fused product and write down the best.

    python benchmarks/tune_fused.py

For every shape of ``layer_gpu.py``, with the row counts of a random router: candidates take turns,
medians decide. The times go to results/tune_fused.json, the choices to the table that is shipped,
expertmesh/kernels/moe_mlp/fused/h200.json.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from layer_gpu import BF16, SHAPES, Shape, medians  # beside this file
from record import RESULTS, save
from torch import Tensor

from expertmesh.kernels.moe_mlp.fused import launch
from expertmesh.kernels.moe_mlp.fused.metadata import Layout, make_layout
from expertmesh.kernels.moe_mlp.fused.plan import SHIPPED, Tile, Turns

WIDE = Tile(columns=256, depth=64, warps=8, stages=3)
TALL = replace(WIDE, rows=256, columns=128)
PAIR = replace(WIDE, columns=128, per_sm=2)
"""Two programs on a multiprocessor: one's stores overlap the other's products."""

Candidate = Tile | Turns | None

CANDIDATES: dict[str, list[Candidate]] = {
    "up": [
        replace(WIDE, group=4),
        replace(WIDE, stages=4),
        replace(WIDE, stages=4, group=4),
        replace(WIDE, stages=4, group=16),
        replace(WIDE, flatten=True),
        replace(WIDE, stages=4, flatten=True),
    ],
    "down": [
        None,
        replace(WIDE, flatten=True),
        replace(WIDE, stages=4, flatten=True),
        Turns(),
        Turns(group=8),
    ],
    "dhidden": [
        replace(PAIR, chunks=4, registers=128, group=4),
        Turns(),
        Turns(group=2),
    ],
    "dweight": [
        None,
        replace(TALL, stages=5),
        replace(TALL, stages=5, group=4),
        replace(TALL, stages=5, group=2),
        replace(TALL, stages=7),
        replace(PAIR, warps=4, stages=5, group=4),
    ],
    "copied": [None],
}


PRODUCTS = ["up", "up, inference", "down", "dhidden", "dx", "dup", "ddown", "ddown, copied"]


@dataclass(frozen=True)
class Buffers:
    """Operands of every product of one shape."""

    shape: Shape
    layout: Layout
    x_RD: Tensor
    weight_RK: Tensor
    up_EPFD: Tensor
    down_EDF: Tensor
    hidden_NF: Tensor
    pre_NH: Tensor

    @staticmethod
    def of(shape: Shape) -> "Buffers":
        """Random ones, with a random router's choices."""

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device="cuda", dtype=BF16)

        x_RD = normal(shape.T, shape.D)
        score_RE = (x_RD @ normal(shape.D, shape.E) * shape.D**-0.5).float().softmax(-1)
        weight_RK, expert_RK = score_RE.topk(shape.K)
        num_rows = shape.T * shape.K
        return Buffers(
            shape,
            make_layout(expert_RK, shape.E, 128),
            x_RD,
            weight_RK,
            normal(shape.E, 2, shape.F, shape.D) * shape.D**-0.5,
            normal(shape.E, shape.D, shape.F) * shape.F**-0.5,
            normal(num_rows, shape.F),
            normal(num_rows, 2 * shape.F),
        )


def steps(buffers: Buffers) -> dict[str, tuple[str, int, Callable[[Any], object]]]:
    """By product: whose candidates, FLOPs, and what runs it with a tile."""
    shape, layout = buffers.shape, buffers.layout
    x, up, down = buffers.x_RD, buffers.up_EPFD, buffers.down_EDF
    hidden, pre, weight = buffers.hidden_NF, buffers.pre_NH, buffers.weight_RK
    one = 2 * shape.T * shape.K * shape.D * shape.F
    project = partial(launch.up_project, x, up, None, layout, shape.K, "silu")
    multiply = launch.multiply_rows
    copied = launch.gather(x, layout, shape.K)

    def dhidden(tile: Tile | Turns) -> object:
        copy = launch.gather(x, layout, shape.K) if isinstance(tile, Turns) else None
        return launch.hidden_gradient(x, down, weight, pre, layout, "silu", tile, dy_ND=copy)

    ddown = partial(launch.weight_gradient, hidden, x, layout, shape.K, down, flipped=True)
    return {
        "up": ("up", 2 * one, partial(project, keep=True)),
        "up, inference": ("up", 2 * one, partial(project, keep=False)),
        "down": (
            "down",
            one,
            lambda tile: multiply(hidden, down.unsqueeze(1), layout, tile, transposed=True),
        ),
        "dhidden": ("dhidden", one, dhidden),
        "dx": ("down", 2 * one, lambda tile: multiply(pre, up, layout, tile, transposed=False)),
        "dup": (
            "dweight",
            2 * one,
            partial(launch.weight_gradient, pre, x, layout, shape.K, up, flipped=False),
        ),
        "ddown": ("dweight", one, ddown),
        "ddown, copied": ("copied", one, partial(ddown, gathered_NO=copied)),
    }


def describe(tile: Candidate) -> str:
    """A tile in one word."""
    if tile is None:
        return "grouped_mm"
    if isinstance(tile, Turns):
        return f"turns-s{tile.stages}-g{tile.group}"
    words = [f"{tile.rows}x{tile.columns}x{tile.depth}", f"w{tile.warps}", f"s{tile.stages}"]
    for field, letter, usual in (("per_sm", "p", 1), ("group", "g", 8), ("chunks", "c", 1)):
        value = getattr(tile, field)
        words += [f"{letter}{value}"] if value != usual else []
    words += [f"r{tile.registers}"] if tile.registers else []
    return "-".join([*words, *(["f"] if tile.flatten else [])])


def measure(shape: Shape, rounds: int, products: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds by product and tile."""
    times = {}
    for product, (family, flops, run) in steps(Buffers.of(shape)).items():
        if product not in products:
            continue
        contenders: dict[str, Callable[[], object]] = {}
        for tile in CANDIDATES[family]:
            try:
                run(tile)
                torch.cuda.synchronize()
            except Exception as error:  # no contender: this Triton does not compile it
                print(f"  {product} {describe(tile)}: {type(error).__name__} {str(error)[:80]}")
                continue
            contenders[describe(tile)] = partial(run, tile)
        times[product] = medians(contenders, rounds)
        for name, ms in times[product].items():
            print(f"  {product:14} {name:28} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s")
    return times


def best(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The fastest tile of each product, as the shipped table holds it.

    The two that can share a copy of the output's gradient are chosen together.
    """
    families = (
        ("up", "up"),
        ("down", "down"),
        ("dhidden", "dhidden"),
        ("dx", "down"),
        ("dup", "dweight"),
        ("ddown", "dweight"),
    )
    chosen = {}
    for product, family in families:
        tiles = {describe(tile): tile for tile in CANDIDATES[family]}
        measured = {name: ms for name, ms in times[product].items() if name in tiles}
        chosen[product] = tiles[min(measured, key=measured.__getitem__)]
    dhidden, ddown = times["dhidden"], times["ddown"]
    shared = min(ms for name, ms in dhidden.items() if name.startswith("turns"))
    shared += times["ddown, copied"]["grouped_mm"]
    apart = min(ms for name, ms in dhidden.items() if not name.startswith("turns"))
    if shared < apart + min(ddown.values()):
        chosen["ddown"] = None
        dhidden = {name: ms for name, ms in dhidden.items() if name.startswith("turns")}
    else:
        dhidden = {name: ms for name, ms in dhidden.items() if not name.startswith("turns")}
    tiles = {describe(tile): tile for tile in CANDIDATES["dhidden"]}
    chosen["dhidden"] = tiles[min(dhidden, key=dhidden.__getitem__)]
    return {product: None if tile is None else _fields(tile) for product, tile in chosen.items()}


def _fields(tile: Tile | Turns) -> dict[str, Any]:
    """Those that differ from the usual."""
    if isinstance(tile, Turns):
        usual = asdict(Turns())
        return {"turns": {name: v for name, v in asdict(tile).items() if v != usual[name]}}
    usual = asdict(Tile(columns=0, depth=0, warps=0, stages=0))
    return {name: value for name, value in asdict(tile).items() if value != usual[name]}


def table(plans: dict[str, dict[str, Any]]) -> str:
    """The shipped table, one product a line."""
    shapes = []
    for name, plan in plans.items():
        lines = [f'  "{product}": {json.dumps(fields)}' for product, fields in plan.items()]
        shapes.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    device = json.dumps(torch.cuda.get_device_name())
    return f'{{"device": {device}, "plans": {{\n' + ",\n".join(shapes) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS)
    parser.add_argument("--keep", action="store_true", help="earlier times where none are taken")
    parser.add_argument("--dry", action="store_true", help="write nothing: fill Triton's cache")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    all_times = known_times() if arguments.keep else {}
    for name in arguments.shapes:
        print(name)
        measured = measure(SHAPES[name], arguments.rounds, arguments.products)
        all_times[name] = all_times.get(name, {}) | measured
    if not arguments.dry:
        save("tune_fused", {"median_ms": all_times})
        plans = {f"{SHAPES[name].D}x{SHAPES[name].F}": best(t) for name, t in all_times.items()}
        SHIPPED.write_text(table(plans), encoding="utf-8")


def known_times() -> dict[str, dict[str, dict[str, float]]]:
    """What an earlier run measured."""
    content = json.loads((RESULTS / "tune_fused.json").read_text(encoding="utf-8"))
    times: dict[str, dict[str, dict[str, float]]] = content["median_ms"]
    return times


if __name__ == "__main__":
    main()
