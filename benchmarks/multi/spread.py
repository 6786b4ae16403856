"""OpenMoE 8B loaded on one GPU and over all of them by a device map: the same text."""

import os
import shutil
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from multi.world import World

GB = 1e9
PROMPT, NEW_TOKENS = 16, 32
IN_MEMORY = Path("/dev/shm")
ALONE, AUTO, BLOCKS = "one", "auto", "blocks cut evenly"
"""Device maps: the others' text should be that of the first."""
LEAST = {ALONE: 1, AUTO: 2}
"""Devices that must hold blocks; all of them where it does not say. ``auto`` may leave one of many
devices empty: a block with experts is 4.5 of the model's 23.7 GB, and is not cut."""


def measure(world: World) -> dict[str, Any]:
    """What the first process sees; the others' devices hold blocks and their hosts wait."""
    result: dict[str, Any] = {
        "model": "openmoe-test" if world.tiny else "openmoe-8b",
        "dtype": "bfloat16",
        "weights": "random",
        "new tokens": NEW_TOKENS,
        "devices": len(_devices(world)),
    }
    own = world.attempt(partial(_all_maps, world, result["model"]))
    result["maps"] = world.gather(own)[0]
    return result


def _all_maps(world: World, name: str) -> dict[str, Any] | None:
    """By map; None on all ranks but the first."""
    if world.rank != 0:
        return None
    config = decoder_preset(name, **({"vocab_size": 512} if world.tiny else {}))
    with tempfile.TemporaryDirectory(dir=_room(config), prefix="expertmesh-spread-") as scratch:
        folder = Path(scratch, "model")
        _write(config, world.device, folder)
        world.free()
        torch.manual_seed(0)
        # The first id begins a text.
        prompt_BS = torch.randint(3, config.vocab_size, (1, PROMPT))
        prompt_BS[:, 0] = 0
        rows: dict[str, Any] = {}
        texts: dict[str, list[int]] = {}
        for kind, where in _maps(world, config).items():
            rows[kind], texts[kind] = _load_and_write(world, folder, where, prompt_BS)
            rows[kind]["same text"] = texts[kind] == texts[ALONE]
            world.free()
            world.say(f"  {kind:18} {rows[kind]}")
    return rows


def _room(config: DecoderConfig) -> str | None:
    """A folder in memory where the weights fit into it, else the usual one for such files."""
    wanted = 1.1 * torch.bfloat16.itemsize * config.num_params
    if os.access(IN_MEMORY, os.W_OK) and shutil.disk_usage(IN_MEMORY).free > wanted:
        return str(IN_MEMORY)
    return None


def _write(config: DecoderConfig, device: torch.device, folder: Path) -> None:
    """A published folder of random weights."""
    from expertmesh.hf.openmoe import as_openmoe

    with torch.device("meta"):
        model = DecoderLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    model.init_weights(0)
    as_openmoe(model.eval(), dtype="bfloat16").save_pretrained(folder)


def _devices(world: World) -> list[Any]:
    return list(range(world.size)) if world.device.type == "cuda" else ["cpu", "disk"]


def _maps(world: World, config: DecoderConfig) -> dict[str, dict[str, Any]]:
    """What ``from_pretrained`` is told, by kind."""
    devices, num_layers = _devices(world), config.num_layers
    cut: dict[str, Any] = {"": devices[-1], "model.embed_tokens": devices[0]}
    for layer in range(num_layers):
        cut[f"model.layers.{layer}"] = devices[layer * len(devices) // num_layers]
    return {
        ALONE: {"device_map": {"": devices[0]}},
        AUTO: {"device_map": "auto", "max_memory": _limits(world, config)},
        BLOCKS: {"device_map": cut},
    }


def _limits(world: World, config: DecoderConfig) -> dict[int | str, int]:
    """Bytes of each device: its even part and a block more, as accelerate wants to have it."""
    with torch.device("meta"):
        model = DecoderLM(config)
    blocks = [sum(param.numel() for param in block.parameters()) for block in model.blocks]
    limit = torch.bfloat16.itemsize * (config.num_params // world.size + max(blocks))
    if world.device.type != "cuda":
        return {"cpu": limit}
    return dict.fromkeys(range(world.size), limit)


def _load_and_write(
    world: World, folder: Path, where: dict[str, Any], prompt_BS: Tensor
) -> tuple[dict[str, Any], list[int]]:
    """Figures of a map, and the new tokens."""
    from expertmesh.hf import OpenMoeForCausalLM

    start = time.perf_counter()
    model = OpenMoeForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, offload_folder=folder.with_name("offload"), **where
    ).eval()
    world.synchronize()
    row = {
        "seconds load": round(time.perf_counter() - start, 2),
        "GB": _allocated(world),
        "blocks": _blocks(model),
    }
    ids_BS = prompt_BS.to(world.device)
    start = time.perf_counter()
    made_BS = model.generate(
        ids_BS,
        attention_mask=torch.ones_like(ids_BS),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    text = made_BS[0, PROMPT:].tolist()
    row["seconds text"] = round(time.perf_counter() - start, 2)
    row["different tokens"] = len(set(text))
    return row, text


def _allocated(world: World) -> list[float]:
    if world.device.type != "cuda":
        return []
    return [round(torch.cuda.memory_allocated(gpu) / GB, 2) for gpu in range(world.size)]


def _blocks(model: nn.Module) -> dict[str, int]:
    """How many blocks lie on each device; what is on the meta device is read from the disk."""
    found: Counter[str] = Counter()
    for block in model.model.blocks:  # type: ignore[union-attr]  # a DecoderLM's
        names = {"disk" if p.is_meta else str(p.device) for p in block.parameters()}
        found.update([" and ".join(sorted(names))])
    return dict(sorted(found.items()))


def table(result: dict[str, Any]) -> list[str]:
    """Lines for a terminal."""
    maps = result["maps"]
    title = f"{result['model']}, {result['weights']} weights in {result['dtype']}"
    if isinstance(maps, str):
        return [f"{title}: {maps}"]
    lines = [
        f"{title}, {result['new tokens']} tokens written",
        "| device map | blocks | GB | load, s | text, s | same text |",
        "|---|---|---|---:|---:|---|",
    ]
    for kind, row in maps.items():
        blocks = ", ".join(f"{device} {num}" for device, num in row["blocks"].items())
        held = ", ".join(map(str, row["GB"]))
        same = "yes" if row["same text"] else "no"
        cells = (kind, blocks, held, row["seconds load"], row["seconds text"], same)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def failures(result: dict[str, Any]) -> list[str]:
    """Texts that differ, and devices without a block."""
    maps = result["maps"]
    if isinstance(maps, str):
        return [f"openmoe: {maps}"]
    found = []
    for kind, row in maps.items():
        if not row["same text"]:
            found.append(f"openmoe: {kind} writes another text than one device")
        wanted = LEAST.get(kind, result["devices"])
        if len(row["blocks"]) < wanted:
            found.append(f"openmoe: {kind} has blocks on {', '.join(row['blocks'])} alone")
    return found
