"""Time the candidate tiles of each fused product and write down the best.

    python benchmarks/tune_fused.py

For every shape of ``layer_gpu.py``, with the row counts of a random router: candidates take turns,
medians decide. The times go to results/tune_fused.json, the choices to the table that is shipped,
expertmesh/kernels/moe_mlp/fused/h200.json. What a run does not measure stays as it is in both, so
single shapes or products can be measured again; ``--fresh`` forgets earlier times.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from layer_gpu import BF16, SHAPES, Shape, medians  # beside this file
from record import RESULTS, load_if_there, save, stamps_of
from torch import Tensor

from expertmesh.kernels.layout import Layout, make_layout
from expertmesh.kernels.moe_mlp.fused import launch
from expertmesh.kernels.moe_mlp.fused.plan import SHIPPED, Gather, Quack, Tile, Turns
from expertmesh.kernels.moe_mlp.quack import QUACK_MISSING

WIDE = Tile(columns=256, depth=64, warps=8, stages=3)
TALL = replace(WIDE, rows=256, columns=128)
PAIR = replace(WIDE, columns=128, per_sm=2)
"""Two programs on a multiprocessor: one's stores overlap the other's products."""

Candidate = Tile | Turns | Gather | Quack | None
Times = dict[str, dict[str, dict[str, float]]]
"""Milliseconds by shape, product and tile."""

CANDIDATES: dict[str, list[Candidate]] = {
    "up": [
        replace(WIDE, group=2),
        replace(WIDE, group=4),
        WIDE,
        replace(WIDE, stages=4, group=2),
        replace(WIDE, stages=4, group=4),
        replace(WIDE, stages=4),
        replace(WIDE, stages=4, group=16),
        replace(WIDE, flatten=True),
        replace(WIDE, stages=4, flatten=True),
    ],
    "down": [
        None,
        replace(WIDE, flatten=True),
        replace(WIDE, flatten=True, group=4),
        replace(WIDE, stages=4, flatten=True),
        Turns(group=2),
        Turns(),
        Turns(group=8),
    ],
    "dhidden": [
        replace(PAIR, chunks=4, registers=128, group=4),
        Turns(),
        Turns(group=2),
        Turns(gather=True),
        Turns(group=2, gather=True),
    ],
    "dweight": [
        None,
        replace(TALL, stages=5, group=2),
        Gather(),
        Gather(gathered=256, grouped=128),
    ],
    "copied": [None],
    "quack": [Quack(), Quack(columns=192, pingpong=True), Quack(rows=256, columns=128)],
}


NAME = "tune_fused"
_RUN_IN_MS = 100  # candidates of one product leave each other nearly the same clock
PRODUCTS = ["up", "up, inference", "down", "dhidden", "dx", "dup", "ddown", "ddown, copied"]
PRODUCTS += ["dup, QuACK", "ddown, QuACK"] if QUACK_MISSING is None else []


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
    copied = launch.spread(x, layout)

    def dhidden(tile: Tile | Turns) -> object:
        copied = isinstance(tile, Turns) and not tile.gather
        copy = launch.spread(x, layout) if copied else None
        return launch.hidden_gradient(x, down, weight, pre, layout, "silu", tile, dy_ND=copy)

    ddown = partial(launch.weight_gradient, hidden, x, layout, shape.K, down, flipped=True)
    dup = partial(launch.weight_gradient, pre, x, layout, shape.K, up, flipped=False)
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
        "dup": ("dweight", 2 * one, dup),
        "ddown": ("dweight", one, ddown),
        "ddown, copied": ("copied", one, partial(ddown, gathered_NO=copied)),
        "dup, QuACK": ("quack", 2 * one, dup),
        "ddown, QuACK": ("quack", one, ddown),
    }


def describe(tile: Candidate) -> str:
    """A tile in one word."""
    if tile is None:
        return "grouped_mm"
    if isinstance(tile, Turns):
        return f"turns-s{tile.stages}-g{tile.group}" + ("-gather" if tile.gather else "")
    if isinstance(tile, Gather):
        return f"gather-{tile.gathered}x{tile.grouped}-g{tile.group}"
    if isinstance(tile, Quack):
        return f"quack-{tile.rows}x{tile.columns}" + ("-pingpong" if tile.pingpong else "")
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
        times[product] = medians(contenders, rounds, run_in_ms=_RUN_IN_MS)
        for name, ms in times[product].items():
            print(f"  {product:14} {name:28} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s")
    return times


def best(times: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The fastest tile of each product, as the shipped table holds it.

    The two that can share a copy of the output's gradient are chosen together. A product without
    times, or whose times are not of today's candidates, is left out.
    """
    families = (
        ("up", "up"),
        ("down", "down"),
        ("dhidden", "dhidden"),
        ("dx", "down"),
        ("dup", "dweight"),
        ("ddown", "dweight"),
    )
    chosen: dict[str, Candidate] = {}
    for product, family in families:
        found = fastest(times.get(product, {}), CANDIDATES[family])
        if found is not None:
            chosen[product] = found[0]
    chosen |= _together(times)
    return {product: None if tile is None else _fields(tile) for product, tile in chosen.items()}


def fastest(
    times: dict[str, float], candidates: Sequence[Candidate]
) -> tuple[Candidate, float] | None:
    """The candidate of the least time, with it; None where none has one."""
    measured = [(times[describe(tile)], tile) for tile in candidates if describe(tile) in times]
    if not measured:
        return None
    ms, tile = min(measured, key=itemgetter(0))
    return tile, ms


def _together(times: dict[str, dict[str, float]]) -> dict[str, Candidate]:
    """Both gradients behind the down projection, if everything that decides has been measured.

    By turns that do not gather, the first copies the output's gradient, and the second may use it.
    """
    gathers = {tile: not isinstance(tile, Turns) or tile.gather for tile in CANDIDATES["dhidden"]}
    found = times.get("dhidden", {})
    copying = fastest(found, [tile for tile, gathering in gathers.items() if not gathering])
    gathering = fastest(found, [tile for tile, gathering in gathers.items() if gathering])
    copied = fastest(times.get("ddown, copied", {}), CANDIDATES["copied"])
    alone = fastest(times.get("ddown", {}), CANDIDATES["dweight"])
    if copying is None or gathering is None or copied is None or alone is None:
        return {}
    pairs = [(copying, copied), (copying, alone), (gathering, alone)]
    dhidden, ddown = min(pairs, key=lambda pair: pair[0][1] + pair[1][1])
    return {"dhidden": dhidden[0], "ddown": ddown[0]}


def _fields(tile: Tile | Turns | Gather) -> dict[str, Any]:
    """Those that differ from the usual."""
    if isinstance(tile, Tile):
        return _unusual(tile, Tile(columns=0, depth=0, warps=0, stages=0))
    if isinstance(tile, Turns):
        return {"turns": _unusual(tile, Turns())}
    return {"gather": _unusual(tile, Gather())}


def _unusual(tile: Any, usual: Any) -> dict[str, Any]:
    before = asdict(usual)
    return {name: value for name, value in asdict(tile).items() if value != before[name]}


def table(plans: dict[str, dict[str, Any]], device: str) -> str:
    """The shipped table, one product a line."""
    shapes = []
    for name, plan in plans.items():
        lines = [f'  "{product}": {json.dumps(fields)}' for product, fields in plan.items()]
        shapes.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    return f'{{"device": {json.dumps(device)}, "plans": {{\n' + ",\n".join(shapes) + "\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=PRODUCTS)
    parser.add_argument("--fresh", action="store_true", help="forget the times of earlier runs")
    parser.add_argument("--dry", action="store_true", help="write nothing: fill Triton's cache")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    old = {} if arguments.fresh else load_if_there(NAME)
    new: Times = {}
    for name in arguments.shapes:
        print(name)
        new[name] = measure(SHAPES[name], arguments.rounds, arguments.products)
        if not arguments.dry:  # after each: a run may be cut
            keep(old, new, torch.cuda.get_device_name())


def keep(
    old: dict[str, Any],
    new: Times,
    device: str,
    folder: Path = RESULTS,
    shipped: Path = SHIPPED,
) -> None:
    """Write both files: new times and choices in the place of the old ones, the others as is."""
    times: Times = dict(old.get("median_ms", {}))
    times |= {name: times.get(name, {}) | products for name, products in new.items()}
    before = json.loads(shipped.read_text(encoding="utf-8")) if shipped.exists() else {}
    plans = before["plans"] if before.get("device") == device else {}
    for name in new:
        key = f"{SHAPES[name].D}x{SHAPES[name].F}"
        plans[key] = plans.get(key, {}) | best(times[name])
    parts = [
        f"{name}: {product}"
        for name, products in times.items()
        for product in products
        if product not in new.get(name, {})
    ]
    save(NAME, {"median_ms": times}, folder, kept=stamps_of(old, parts))
    shipped.write_text(table(plans, device), encoding="utf-8")


if __name__ == "__main__":
    main()
