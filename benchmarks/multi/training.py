"""Training steps of a decoder: tokens per second per device at 1 and W, beside transformers."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from expertmesh.data import Batch
from expertmesh.models import DecoderConfig
from expertmesh.models.presets import decoder_preset
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.strategies import Strategy, strategy
from multi.build import make_stepper
from multi.rival import LR, transformers_step
from multi.world import Step, World

LAYERS = 4
"""Of olmoe-1b-7b's 16: weights, gradients and moments of all would be 111 GB on one device."""
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_hidden": 16,
}
ROWS, SEQUENCE = 8, 4096
ROUNDS, WARM = 6, 3
AIM = 0.9
"""Weak scaling of the best of our ways."""
ALONE, RIVAL_ALONE, RIVAL = "1 device", "transformers, 1 device", "transformers, FSDP2"


def measure(world: World) -> dict[str, Any]:
    """Tokens per second per device by way."""
    changes: dict[str, Any] = {"num_layers": LAYERS}
    rows, length = ROWS, SEQUENCE
    if world.tiny:
        changes, rows, length = TINY, 2, 16
    config = decoder_preset("olmoe-1b-7b", **changes)
    num_experts = config.num_experts
    ways: dict[str, Strategy | None] = {ALONE: None, "dp": Strategy(ep=1, zero=2, expert_zero=2)}
    ways["ep"] = strategy("ep", world.size, num_experts)
    if world.size % 2 == 0:
        ways["ep_zero"] = strategy("ep_zero", world.size, num_experts)
    result: dict[str, Any] = {
        "model": f"olmoe-1b-7b, {config.num_layers} layers",
        "tokens per device": rows * length,
        "precision": "bf16 products, float32 parameters; AdamW, clipping, balance and z losses",
        "rival": "transformers, grouped_mm and sdpa, FSDP2: float32 parameters that are gathered "
        "as bfloat16; no router loss",
        "tokens per second per device": {},
        "peak GiB": {},
    }
    builders: dict[str, Callable[[], Step]] = {
        name: partial(_ours, world, config, rows, length, chosen) for name, chosen in ways.items()
    }
    for name, size in ((RIVAL_ALONE, 1), (RIVAL, world.size)):
        builders[name] = partial(transformers_step, world, config, rows, length, size)
    for name, build in builders.items():
        _note(world, result, name, build, rows * length)
    speeds = result["tokens per second per device"]
    result["weak scaling"] = _efficiency(speeds)
    return result


def _note(
    world: World, result: dict[str, Any], name: str, build: Callable[[], Step], num_tokens: int
) -> None:
    """Build, time, forget."""
    speeds = result["tokens per second per device"]
    if not world.has_time():
        speeds[name] = "left out: no time"
        return
    found = world.attempt(partial(_timed, world, build))
    if isinstance(found, str):
        speeds[name] = found
        world.say(f"  {name}: {found}")
        return
    seconds, peak = found
    speeds[name] = round(num_tokens / seconds, 1)
    result["peak GiB"][name] = round(peak, 2)
    world.say(f"  {name:24} {speeds[name]:10.0f} tokens/s per device, {1e3 * seconds:.1f} ms")


def _timed(world: World, build: Callable[[], Step]) -> tuple[float, float]:
    """Seconds of a step, and peak GiB."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = world.seconds(build(), *((1, 1) if world.tiny else (ROUNDS, WARM)))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return seconds, max(world.gather(peak))


def _ours(
    world: World, config: DecoderConfig, rows: int, length: int, chosen: Strategy | None
) -> Step:
    """A step of the trainer; without a strategy each rank trains for itself, all at once."""
    mesh, zero, expert_zero = None, 2, 2
    if chosen is not None and world.size > 1:
        mesh = Mesh(
            pp=chosen.pp, ep=chosen.ep, placement=chosen.placement, device=world.device.type
        )
        zero, expert_zero = chosen.zero, chosen.expert_zero
    num_rows = rows if mesh is None else rows * world.size
    stepper = make_stepper(
        config,
        world.device,
        precision="bf16",
        sequences=num_rows,
        lr=LR,
        mesh=mesh,
        zero=zero,
        expert_zero=expert_zero,
    )
    batch = random_batch(config.vocab_size, num_rows, length)
    return lambda: stepper.step(1, batch)


def random_batch(vocab_size: int, rows: int, length: int) -> Batch:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    return Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], None, torch.arange(rows))


def _efficiency(speeds: Mapping[str, float | str]) -> dict[str, float]:
    """Speed per device over that of one device by itself."""
    found = {}
    for name, base in (("dp", ALONE), ("ep", ALONE), ("ep_zero", ALONE), (RIVAL, RIVAL_ALONE)):
        many, one = speeds.get(name), speeds.get(base)
        if isinstance(many, float) and isinstance(one, float):
            found[name] = round(many / one, 3)
    return found


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = [
        f"{result['model']}, {result['tokens per device']} tokens per device and step",
        "| way | tokens/s per device | weak scaling | peak GiB |",
        "|---|---:|---:|---:|",
    ]
    for name, speed in result["tokens per second per device"].items():
        scaling, peak = result["weak scaling"].get(name, ""), result["peak GiB"].get(name, "")
        lines.append(f"| {name} | {speed} | {scaling} | {peak} |")
    return lines + ([result["note"]] if "note" in result else [])


def failures(result: dict[str, Any]) -> list[str]:
    """What misses its aim."""
    speeds = result["tokens per second per device"]
    found = [
        f"training: {name} {speed}" for name, speed in speeds.items() if isinstance(speed, str)
    ]
    ours = {n: e for n, e in result["weak scaling"].items() if n != RIVAL}
    if ours and max(ours.values()) < AIM:
        found.append(f"training: weak scaling {ours}")
    return found
