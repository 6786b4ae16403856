"""The layer over W devices: its parts, its all-to-all against the link, its waiting host."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from layer_gpu import BF16, SEQUENCE, SHAPES, Shape  # in the folder above
from torch import Tensor

from expertmesh.dispatch.collectives import Group
from expertmesh.dispatch.transport import Plan
from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.experts import place_experts
from expertmesh.parallel.mesh import Mesh
from expertmesh.routing import Capacity, router_preset
from multi.world import Step, World

ROUNDS = 20
AIM = 0.85
"""Of a plain exchange's speed."""
LARGE = ("dispatch", "combine", "combine backward", "dispatch backward")
"""Exchanges of whole rows; ids, weights and counts are small."""


NAMES = ("olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b")
"""Of ``layer_gpu.py``'s shapes, whose tokens T are those of each rank here."""
TINY = {"tiny": Shape(96, 32, 16, 8, 2, "olmoe")}
STATIC = {"olmoe-1b-7b", "tiny"}
"""Measured with static dispatch too: capacity 1.5 per sequence."""


def measure(world: World) -> dict[str, Any]:
    """Milliseconds, bytes per second and host waits by shape."""
    result: dict[str, Any] = {"dtype": "bfloat16", "ep": world.size, "rounds": ROUNDS}
    shapes = TINY if world.tiny else {name: SHAPES[name] for name in NAMES}
    result["shapes"] = {name: asdict(shape) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        for dispatch in ("all_to_all", "static") if name in STATIC else ("all_to_all",):
            title = name if dispatch == "all_to_all" else f"{name} static"
            if not world.has_time():
                result[title] = "left out: no time"
                continue
            result[title] = world.attempt(partial(_measure, world, shape, dispatch))
            world.say(f"  {title:22} {result[title]}")
    return result


def _measure(world: World, shape: Shape, dispatch: str) -> dict[str, Any]:
    mesh = Mesh(ep=world.size, device=world.device.type)
    moe = _layer(world, shape, mesh, dispatch)
    group = mesh.group(("ep", "etp"))
    length = min(SEQUENCE, shape.T)
    torch.manual_seed(world.rank)
    x_BSD, dy_BSD = torch.randn(
        2, shape.T // length, length, shape.D, device=world.device, dtype=BF16
    ).unbind()
    x_BSD.requires_grad_()
    wanted = [x_BSD, *moe.parameters()]

    def step() -> object:
        return torch.autograd.grad(moe.train()(x_BSD), wanted, dy_BSD)

    rounds = 2 if world.tiny else ROUNDS
    step()
    group.traffic.bytes_sent.clear()
    step()
    sent = dict(group.traffic.bytes_sent)
    steps, plan = _parts(moe, x_BSD, dy_BSD)
    row = {
        "forward and backward ms": world.median_ms(step, rounds),
        **{f"{name} ms": world.median_ms(run, rounds) for name, run in steps.items()},
        "host waits": world.host_waits(step),
        "bytes sent": sent,
    }
    if world.size > 1:
        row |= _rates(world, step, plan, group, sent, shape.D, rounds)
    return {name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}


def _layer(world: World, shape: Shape, mesh: Mesh, dispatch: str) -> MoE:
    options: dict[str, Any] = {
        "dim": shape.D,
        "num_experts": shape.E,
        "k": shape.K,
        "seed": 0,
    }
    if dispatch == "static":
        options["capacity"] = Capacity(factor=1.5, scope="sequence")
    with torch.device("meta"):
        router = router_preset(shape.router, **options)
        moe = MoE(router, GatedMLPExperts(shape.D, shape.F, shape.E, seed=0, dtype=BF16))
    place_experts(moe, mesh, dispatch=dispatch)
    moe.to_empty(device=world.device)
    moe.reset_parameters(0)
    return moe


def _parts(moe: MoE, x_BSD: Tensor, dy_BSD: Tensor) -> tuple[dict[str, Step], Any]:
    """Forward and backward of each part by itself, for one decision of the router."""
    with torch.no_grad():
        _, decided = moe.train()(x_BSD, return_routing=True)
    weight_TK = decided.weight_TK.detach().requires_grad_()
    routing = replace(decided, weight_TK=weight_TK)
    x_TD = x_BSD.detach().flatten(0, 1).requires_grad_()
    dy_TD = dy_BSD.flatten(0, 1)
    sent = moe.dispatcher.dispatch(x_TD, routing)
    x_RD = sent.x_RD.detach().requires_grad_()
    weight_RK = sent.weight_RK.detach().requires_grad_()
    dx_RD, dweight_RK = torch.randn_like(x_RD), torch.randn_like(weight_RK)
    experts = list(moe.experts.parameters())

    def dispatch() -> object:
        out = moe.dispatcher.dispatch(x_TD, routing)
        return torch.autograd.grad(
            [out.x_RD, out.weight_RK], [x_TD, weight_TK], [dx_RD, dweight_RK]
        )

    def run_experts() -> object:
        y_RD = moe.experts(x_RD, sent.expert_RK, weight_RK)
        return torch.autograd.grad(y_RD, [x_RD, weight_RK, *experts], dx_RD)

    def combine() -> object:
        return torch.autograd.grad(moe.dispatcher.combine(x_RD, sent.context), x_RD, dy_TD)

    steps = {"dispatch": dispatch, "experts": run_experts, "combine": combine}
    return steps, sent.context


def _rates(
    world: World,
    step: Step,
    plan: Plan,
    group: Group,
    sent: dict[str, int],
    width: int,
    rounds: int,
) -> dict[str, Any]:
    """GB/s that leave a rank, the slowest rank's: in the layer, and of plain exchanges."""
    rows = torch.randn(sum(plan.sent), width, device=world.device, dtype=BF16)
    back = rows.new_empty(sum(plan.received), width)
    each = min(world.gather(sum(plan.sent))) // group.size
    even = rows[: each * group.size]
    out = torch.empty_like(even)

    def uneven_exchange() -> object:
        return dist.all_to_all_single(
            back, rows, plan.received, plan.sent, group=group.process_group
        )

    def even_exchange() -> object:
        return dist.all_to_all_single(out, even, group=group.process_group)

    row_bytes = width * BF16.itemsize
    leaving = (sum(plan.sent) - plan.sent[group.index]) * row_bytes
    large = sum(sent[kind] for kind in LARGE)
    waiting, together = world.exchange_ms(step, max(3, rounds // 4), rows.nbytes // 2)
    times = {
        "plain, even": (
            world.median_ms(even_exchange, rounds),
            each * (group.size - 1) * row_bytes,
        ),
        "plain, the same splits": (world.median_ms(uneven_exchange, rounds), leaving),
        "in the layer": (waiting, large),
        "in the layer, ranks together": (together, large),
    }
    rates = {
        name: min(world.gather(num_bytes)) / ms / 1e6 for name, (ms, num_bytes) in times.items()
    }
    return {
        "message bytes": each * row_bytes,
        **{f"GB/s {name}": rate for name, rate in rates.items()},
        "fraction of plain": rates["in the layer, ranks together"] / rates["plain, even"],
    }


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    columns = (
        "forward and backward ms",
        "dispatch ms",
        "experts ms",
        "combine ms",
        "GB/s in the layer",
        "GB/s in the layer, ranks together",
        "GB/s plain, even",
        "fraction of plain",
        "host waits",
    )
    lines = [f"| layer | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in _rows(result):
        filled = row if isinstance(row, dict) else {columns[0]: row}
        cells = ("" if filled.get(column) is None else str(filled[column]) for column in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    titles = [title for name in result["shapes"] for title in (name, f"{name} static")]
    return [(title, result[title]) for title in titles if title in result]


def failures(result: dict[str, Any]) -> list[str]:
    """What misses its aim."""
    found = []
    for name, row in _rows(result):
        if isinstance(row, str):
            found.append(f"layer: {name} {row}")
            continue
        allowed = 0 if name.endswith(" static") else 1
        if row["host waits"] is not None and row["host waits"] > allowed:
            found.append(f"layer: {name} waits {row['host waits']}x for the device")
        fraction = row.get("fraction of plain")
        if fraction is not None and fraction < AIM:
            found.append(f"layer: {name} all-to-all at {fraction:.2f} of a plain one")
    return found
