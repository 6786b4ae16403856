"""Several GPUs of one host: the same numbers, and how fast.

    make bench-multi GPUS=2
    torchrun --standalone --nproc-per-node 2 benchmarks/multi_gpu.py              all of it
    torchrun --standalone --nproc-per-node 2 benchmarks/multi_gpu.py layer        one section

Sections: training steps at 1 and W GPUs, with transformers and FSDP2 beside, and torchtitan where
it is installed; equivalence on NCCL against one GPU; the layer's parts, its all-to-all against a
plain one, and how often the host waits; a checkpoint of W GPUs resumed on one; OpenMoE 8B loaded
over all GPUs by a device map. What a section measured is kept in
results/multi_gpu.json, those not run as they are there. The exit status is 1 where something
misses its aim. NVLink multicast is left off.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

# Read when libraries begin. A program that uses multicast can put a shared host's GPUs out of
# service.
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")

import torch
from multi import checkpoint, equivalence, layer, spread, training
from multi.world import World
from record import RESULTS, load_if_there, save, stamps_of  # beside this file

from expertmesh.parallel.processes import joined, local_device

NAME = "multi_gpu"
SECTIONS: dict[str, tuple[ModuleType, float]] = {
    "training": (training, 240.0),
    "equivalence": (equivalence, 180.0),
    "layer": (layer, 90.0),
    "checkpoint": (checkpoint, 30.0),
    "openmoe": (spread, 100.0),
}
"""Modules, and the seconds on GPUs after which a section begins no further case. Training is first:
it needs all of a GPU's memory, and of the connections that a section makes some memory stays."""


def main() -> int:
    """Run, keep, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="sizes of a test; any device")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    arguments = parser.parse_args()
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"section must be one of {', '.join(SECTIONS)}, got {name!r}")
    on_gpu = torch.cuda.is_available()
    device = local_device(torch.device("cuda" if on_gpu else "cpu"))
    with joined(device, 150.0):
        world = World(device, tiny=arguments.tiny)
        results: dict[str, Any] = {}
        chosen = arguments.sections or list(SECTIONS)
        old = load_if_there(NAME, arguments.results)
        if _of_other_devices(old, world):
            if any(name in old and name not in chosen for name in SECTIONS):
                parser.error(
                    f"{arguments.results} holds sections of {old['devices']} {old['device']} "
                    "devices; run all sections, or set --results to another folder"
                )
            old = {}
        for name in chosen:
            module, seconds = SECTIONS[name]
            world.say(name)
            world.begin(seconds if on_gpu else math.inf)
            begin = time.monotonic()
            results[name] = module.measure(world)
            results[name]["seconds"] = round(time.monotonic() - begin, 1)
            # After each, so that what is done is not lost with what fails.
            if world.rank == 0:
                _keep(arguments.results, world, old, results)
        failures = _show(world, results)
    # Aims are those of GPUs.
    return int(bool(failures) and on_gpu)


def _keep(folder: Path, world: World, old: dict[str, Any], results: dict[str, Any]) -> None:
    sections = {name: (old | results)[name] for name in SECTIONS if name in old | results}
    kept = stamps_of(old, [name for name in sections if name not in results])
    about = {"devices": world.size, "device": world.device.type}
    save(NAME, {**about, **sections}, folder, kept=kept)


def _of_other_devices(old: dict[str, Any], world: World) -> bool:
    here = {"devices": world.size, "device": world.device.type}
    return any(old.get(key, value) != value for key, value in here.items())


def _show(world: World, results: dict[str, Any]) -> list[str]:
    if world.rank != 0:
        return []
    failures = []
    for name, result in results.items():
        module, _ = SECTIONS[name]
        print("\n".join(["", f"{name}, {result['seconds']} s", *module.table(result)]))
        failures += module.failures(result)
    print("\n".join(["", *(f"MISSED {failure}" for failure in failures)]), flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
