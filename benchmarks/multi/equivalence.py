"""Five steps on W devices over NCCL against one device: losses, gradient norms, parameters."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from expertmesh.data import Batch
from expertmesh.models import DecoderConfig
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import Shard
from expertmesh.testing import relative_error
from expertmesh.testing.equivalence import assemble, by_name, pieces, worst
from expertmesh.train.precision import PrecisionName
from multi.build import Place, make_stepper
from multi.world import World

STEPS = 5
LIMITS: dict[PrecisionName, float] = {"fp32": 1e-3, "bf16": 1e-1}
"""What relative errors of losses and norms may be: rounding, and routers' choices that flip."""

MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "dim": 256,
    "num_layers": 4,
    "num_heads": 8,
    "qk_norm": "full",
    "num_experts": 16,
    "experts_per_token": 4,
    "expert_hidden": 128,
    "router": "olmoe",
}
SEQUENCE, SEQUENCES = 128, 16
TRAINED: dict[str, Any] = {"sequences": SEQUENCES // 2, "lr": 1e-3, "values": 5, "draws": 7}
"""Two micro-batches of a step: gradients add up, and a pipeline is filled."""
TINY: dict[str, Any] = {"vocab_size": 32, "dim": 32, "expert_hidden": 16}


@dataclass(frozen=True)
class Layout:
    """A mesh, its ZeRO stages and the pipeline stages of a rank."""

    axes: dict[str, Any]
    zero: int
    per_rank: int = 1

    def __str__(self) -> str:
        degrees = " ".join(f"{axis}{degree}" for axis, degree in self.axes.items())
        interleaved = f" interleaved{self.per_rank}" if self.per_rank > 1 else ""
        return f"{degrees}{interleaved} zero{self.zero}"


def layouts(world: int) -> list[Layout]:
    """Every axis over all ranks, and where there are four or more, axes together.

    A pipeline has two ranks: the model's blocks make no more than two stages for each of two.
    """
    found = [Layout({"dp": world}, zero) for zero in (0, 1, 2, 3)]
    found += [Layout({"ep": world}, zero) for zero in (1, 2, 3)]
    found += [Layout({"etp": world}, 2), Layout({"tp": world, "ep": world}, 2)]
    found += [Layout({"cp": world}, 2), Layout({"cp": world, "ep": world}, 3)]
    if world == 2:
        found += [Layout({"pp": 2}, 1), Layout({"pp": 2}, 2, per_rank=2)]
    if world % 2 == 0 and world > 2:
        half = world // 2
        found += [Layout({"edp": 2, "ep": half}, zero) for zero in (1, 2, 3)]
        found += [Layout({"ep": half, "etp": 2}, 3), Layout({"tp": 2, "edp": 2, "ep": half}, 2)]
        found += [Layout({"cp": half, "tp": 2, "ep": world}, 3)]
        found += [Layout({"pp": 2, "ep": half}, 2), Layout({"pp": 2, "ep": half}, 1, per_rank=2)]
        found += [Layout({"pp": 2, "cp": half, "ep": half}, 3), Layout({"pp": 2, "tp": half}, 0)]
    return found


def measure(world: World) -> dict[str, Any]:
    """Relative errors by precision and layout."""
    torch.backends.cuda.matmul.allow_tf32 = False
    result: dict[str, Any] = {"steps": STEPS, "limits": dict(LIMITS), "errors": {}}
    meshes: dict[tuple[Any, ...], Mesh] = {}  # connections take long to make
    precisions: tuple[PrecisionName, ...] = ("fp32", "bf16")
    for precision in precisions:
        expected = _train(world, precision, None)
        rows: dict[str, Any] = {}
        for layout in layouts(world.size):
            if not world.has_time():
                rows[str(layout)] = "left out: no time"
                continue
            axes = tuple(layout.axes.items())
            if axes not in meshes:
                meshes[axes] = Mesh(**layout.axes, device=world.device.type)
            place = Place(meshes[axes], layout.zero, per_rank=layout.per_rank)
            row = world.attempt(partial(_compared, world, precision, place, expected))
            rows[str(layout)] = row
            world.say(f"  {precision} {layout!s:22} {_figures(row)}")
        result["errors"][precision] = rows
    return result


@dataclass(frozen=True)
class _Seen:
    losses: list[float]
    norms: list[float]
    gradients: dict[str, Shard]
    parameters: dict[str, Shard]


def _train(world: World, precision: PrecisionName, place: Place | None) -> _Seen:
    config = DecoderConfig(**MODEL | (TINY if world.tiny else {}))
    stepper = make_stepper(config, world.device, precision=precision, place=place, **TRAINED)
    model = stepper.model
    gradients: dict[str, Shard] = {}
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        result = stepper.step(step, batch(world, config.vocab_size, step))
        losses.append(result.loss)
        norms.append(result.grad_norm or 0.0)
        if step == 1:
            named = ((name, p.grad) for name, p in model.named_parameters())
            gradients = _on_host((name, grad) for name, grad in named if grad is not None)
    return _Seen(losses, norms, gradients, _on_host(model.named_parameters()))


def batch(world: World, vocab_size: int, step: int) -> Batch:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(step)
    length = 16 if world.tiny else SEQUENCE
    tokens_BS = torch.randint(vocab_size, (SEQUENCES, length + 1), generator=generator)
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], None, torch.arange(SEQUENCES))


def _on_host(tensors: Any) -> dict[str, Shard]:
    held = pieces(tensors)
    return {name: Shard(s.local.cpu(), s.shape, s.offset) for name, s in held.items()}


def _compared(
    world: World, precision: PrecisionName, place: Place, expected: _Seen
) -> dict[str, float]:
    """Copies that differ between ranks by as much as a bit are an error, and so is a gap.

    Ranks of a pipeline hold parameters of different names: they are put together by name.
    """
    seen = _train(world, precision, place)
    views = world.gather(seen)
    assert all((v.losses, v.norms) == (seen.losses, seen.norms) for v in views)
    tensors = {
        name: worst(by_name(assemble(parts), assemble([whole])))
        for name, parts, whole in (
            ("gradients", [v.gradients for v in views], expected.gradients),
            ("parameters", [v.parameters for v in views], expected.parameters),
        )
    }
    return {
        "losses": relative_error(torch.tensor(seen.losses), torch.tensor(expected.losses)),
        "norms": relative_error(torch.tensor(seen.norms), torch.tensor(expected.norms)),
        **tensors,
    }


def _figures(row: dict[str, float] | str) -> str:
    if isinstance(row, str):
        return row
    return "  ".join(f"{name} {error:.1e}" for name, error in row.items())


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        "| numbers | mesh | losses | norms | gradients | parameters |",
        "|---|---|" + "---:|" * 4,
    ]
    for precision, rows in result["errors"].items():
        for name, row in rows.items():
            cells = [row] if isinstance(row, str) else [f"{error:.1e}" for error in row.values()]
            lines.append(f"| {precision} | {name} | {' | '.join(cells)} |")
    return lines


def failures(result: dict[str, Any]) -> list[str]:
    """What is beyond its limit."""
    found = []
    for precision, rows in result["errors"].items():
        for name, row in rows.items():
            if isinstance(row, str):
                found.append(f"equivalence: {precision} {name} {row}")
                continue
            limit = result["limits"][precision]
            beyond = [kind for kind in ("losses", "norms") if not row[kind] <= limit]
            found += [f"equivalence: {precision} {name} {k} {row[k]:.1e}" for k in beyond]
    return found
