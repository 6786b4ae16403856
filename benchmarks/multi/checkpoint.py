"""A checkpoint of W devices, resumed on one: the same losses."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from expertmesh.models import DecoderConfig
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import relative_error
from expertmesh.train.checkpoint import CheckpointFolder
from expertmesh.train.step import Stepper
from multi.build import Place, make_stepper
from multi.equivalence import MODEL, TINY, TRAINED, batch
from multi.world import World

BEFORE, AFTER = 3, 3
LIMIT = 1e-3


def measure(world: World) -> dict[str, Any]:
    """Losses after the checkpoint, on all devices and on the first alone."""
    name = tempfile.mkdtemp(prefix="expertmesh-multi-") if world.rank == 0 else ""
    folder = Path(world.gather(name)[0])
    try:
        mesh = Mesh(ep=world.size, device=world.device.type)
        stepper = _stepper(world, Place(mesh))
        _train(world, stepper, range(1, BEFORE + 1))
        checkpoints = CheckpointFolder(folder, group=mesh.everyone)
        checkpoints.save(BEFORE, stepper.model, stepper.optimizer, {})
        many = _train(world, stepper, range(BEFORE + 1, BEFORE + AFTER + 1))
        one = _resumed(world, folder) if world.rank == 0 else []
        one = world.gather(one)[0]
    finally:
        if world.rank == 0:
            shutil.rmtree(folder)
    error = relative_error(torch.tensor(one), torch.tensor(many))
    world.say(f"  {world.size} devices {many}, one {one}: {error:.1e}")
    return {"devices": world.size, "losses": many, "resumed on one": one, "error": error}


def _stepper(world: World, place: Place | None) -> Stepper:
    config = DecoderConfig(**MODEL | (TINY if world.tiny else {}))
    return make_stepper(config, world.device, precision="fp32", place=place, **TRAINED)


def _train(world: World, stepper: Stepper, steps: range) -> list[float]:
    vocab_size = MODEL["vocab_size"] if not world.tiny else TINY["vocab_size"]
    return [stepper.step(step, batch(world, vocab_size, step)).loss for step in steps]


def _resumed(world: World, folder: Path) -> list[float]:
    stepper = _stepper(world, None)
    checkpoint, _ = CheckpointFolder(folder).newest_valid()
    assert checkpoint is not None
    checkpoint.load_model(stepper.model)
    checkpoint.load_optimizer(stepper.model, stepper.optimizer)
    return _train(world, stepper, range(checkpoint.step + 1, BEFORE + AFTER + 1))


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    return [
        f"checkpoint of {result['devices']} devices resumed on one: losses within "
        f"{result['error']:.1e}"
    ]


def failures(result: dict[str, Any]) -> list[str]:
    """Losses that differ by more than rounding."""
    return (
        [] if result["error"] <= LIMIT else [f"checkpoint: losses differ by {result['error']:.1e}"]
    )
