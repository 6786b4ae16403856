"""Training steps of a decoder: tokens per second per device at 1 and W, beside others'."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from profiled import where_time_goes  # in the folder above

from expertmesh.data import Batch
from expertmesh.models import DecoderConfig
from expertmesh.models.presets import decoder_preset
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.strategies import Strategy, strategy
from expertmesh.train.collector import collected_later
from multi import rival_torchtitan
from multi.build import Place, make_stepper
from multi.rival import LR, Work, transformers_step
from multi.world import Step, World

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_hidden": 16,
}
SEQUENCE = 4096
WORK = Work(rows=2, micro_batches=4, length=SEQUENCE)
"""Few rows at a time: weights, gradients and moments in float32 are 111 GB on one device."""
ROUNDS, WARM = 4, 2
HELD = 1.0
"""GiB that may be allocated before a way begins."""
AIM = 0.9
"""Weak scaling of the best of our ways."""
ALONE, RIVAL_ALONE, RIVAL = "1 device", "transformers, 1 device", "transformers, FSDP2"
TORCHTITAN = "torchtitan, EP and FSDP2"
OTHERS = (RIVAL_ALONE, RIVAL, TORCHTITAN)
"""What they cannot do is noted, and is no failure of ours."""


def measure(world: World) -> dict[str, Any]:
    """Tokens per second per device by way."""
    changes, work = ({}, WORK) if not world.tiny else (TINY, Work(2, 2, 16))
    config = decoder_preset("olmoe-1b-7b", **changes)
    num_experts = config.num_experts
    ways = {"dp": Strategy(ep=1, zero=2, expert_zero=2)}
    ways["ep"] = strategy("ep", world.size, num_experts)
    if world.size % 2 == 0:
        ways["ep_zero"] = strategy("ep_zero", world.size, num_experts)
    result: dict[str, Any] = {
        "model": f"olmoe-1b-7b, {config.num_layers} layers",
        "tokens per device": work.num_tokens,
        "micro-batches": work.micro_batches,
        "precision": "bf16 products, float32 parameters; AdamW, clipping, balance and z losses",
        "rival": "transformers, grouped_mm and sdpa, FSDP2: float32 parameters that are gathered "
        "as bfloat16, gradients summed once per step; no router loss",
        "torchtitan": rival_torchtitan.words(world.device),
        "tokens per second per device": {},
        "peak GiB": {},
        "profiles": {},
    }
    # Each by itself first, while no connections between the ranks take memory.
    builders: dict[str, Callable[[], Step]] = {
        ALONE: partial(_ours, world, config, work, None),
        RIVAL_ALONE: partial(transformers_step, world, config, work, 1),
        **{name: partial(_ours, world, config, work, chosen) for name, chosen in ways.items()},
        RIVAL: partial(transformers_step, world, config, work, world.size),
    }
    if rival_torchtitan.refusal(world.device) is None:
        builders[TORCHTITAN] = partial(rival_torchtitan.step, world, config, work)
    for name, build in builders.items():
        _note(world, result, name, build, work.num_tokens)
    result["weak scaling"] = _efficiency(result["tokens per second per device"])
    # A profiler that has run may slow launches after it, so no way is timed behind one.
    for name in (ALONE, *ways):
        if world.has_time():
            found = world.attempt(partial(_profile, world, builders[name]))
            if isinstance(found, str):
                world.say(f"  {name} is not profiled: {found}")
            else:
                result["profiles"][name] = found
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
        world.together(_check_empty)
    step = world.together(build)
    # As our trainer and torchtitan's do; so that it helps none more than another.
    step = collected_later()(step)
    seconds = world.seconds(step, *((1, 1) if world.tiny else (ROUNDS, WARM)))
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return seconds, max(world.gather(peak))


def _profile(world: World, build: Callable[[], Step]) -> dict[str, Any]:
    """Where the first rank's time goes in a step."""
    step = world.together(build)
    world.seconds(step, 1, 0)
    found = world.together(partial(where_time_goes, step, world.device))
    return world.gather(found)[0]


def _check_empty() -> None:
    """What is left of what came before would count as the next way's, and there is no room."""
    held = torch.cuda.memory_allocated() / 2**30
    if held > HELD:
        raise RuntimeError(f"{held:.2f} GiB are left of what came before")


def _ours(world: World, config: DecoderConfig, work: Work, chosen: Strategy | None) -> Step:
    """A step of the trainer; without a strategy each rank trains for itself, all at once."""
    place, size = None, 1
    if chosen is not None and world.size > 1:
        mesh = Mesh(
            pp=chosen.pp, ep=chosen.ep, placement=chosen.placement, device=world.device.type
        )
        place, size = Place(mesh, chosen.zero, chosen.expert_zero), world.size
    stepper = make_stepper(
        config, world.device, precision="bf16", sequences=work.rows * size, lr=LR, place=place
    )
    batch = random_batch(config.vocab_size, work.rows * work.micro_batches * size, work.length)
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
        f"{result['model']}, {result['tokens per device']} tokens per device and step in "
        f"{result.get('micro-batches', 1)} micro-batches",
        "| way | tokens/s per device | weak scaling | peak GiB |",
        "|---|---:|---:|---:|",
    ]
    for name, speed in result["tokens per second per device"].items():
        scaling, peak = result["weak scaling"].get(name, ""), result["peak GiB"].get(name, "")
        lines.append(f"| {name} | {speed} | {scaling} | {peak} |")
    for name, profile in result.get("profiles", {}).items():
        shares = sorted(profile["parts"].items(), key=lambda item: -item[1])
        words = ", ".join(f"{part} {share:.0%}" for part, share in shares if share >= 0.005)
        busy = f"{profile['device_ms']:.0f} ms of kernels in {profile['busy_ms']:.0f} ms"
        lines.append(f"{name}: {busy}; {words}")
    return lines + [result[key] for key in ("torchtitan", "note") if key in result]


def failures(result: dict[str, Any]) -> list[str]:
    """What misses its aim."""
    speeds = result["tokens per second per device"]
    found = [
        f"training: {name} {speed}"
        for name, speed in speeds.items()
        if isinstance(speed, str) and name not in OTHERS
    ]
    ours = {n: e for n, e in result["weak scaling"].items() if n != RIVAL}
    if ours and max(ours.values()) < AIM:
        found.append(f"training: weak scaling {ours}")
    return found
