"""Memory of loading published OpenMoE folders and writing 32 tokens, wherever the weights lie.

    python benchmarks/openmoe_load.py            on one H200: results/openmoe_load.json
    python benchmarks/openmoe_load.py --only "8b, RAM and disk"       others stay as they are there
    python benchmarks/openmoe_load.py --tiny     the same code on a small model, here, for tests

The folders are in the published layout, all zeros, and take no room: the files have holes. So
memory is what it is for real weights of these shapes, and times are not: no disk is read, and all
tokens choose the same experts. Every setting has a process of its own. GPU memory is the most that
torch allocated; host memory the most that was the process's own, without the pages of mapped files.
"""

import argparse
import json
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import RESULTS, load_if_there, save, stamps_of  # beside this file

NAME = "openmoe_load"
GB = 1e9
PUBLISHED_GB = {"8b bfloat16": 23, "8b float32": 49, "34b bfloat16": 89}
"""What users of the original are told that a device needs."""
SHARD_BYTES = 10 * 2**30
NEW_TOKENS = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "8b, GPU": {"size": "8b"},
    "8b in float32, GPU": {"size": "8b", "dtype": "float32"},
    "34b, GPU": {"size": "34b"},
    "8b, GPU and RAM": {"size": "8b", "max_memory": {"0": "12GB", "cpu": "100GB"}},
    "34b, GPU and RAM": {"size": "34b", "max_memory": {"0": "80GB", "cpu": "100GB"}},
    "8b, GPU, RAM and disk": {"size": "8b", "max_memory": {"0": "8GB", "cpu": "8GB"}},
    "8b, RAM and disk": {"size": "8b", "max_memory": {"cpu": "10GB"}},
}
TINY: dict[str, dict[str, Any]] = {
    "test": {"size": "test", "device": "cpu", "vocab_size": 512},
    "test, RAM and disk": {
        "size": "test",
        "device": "cpu",
        "vocab_size": 512,
        "max_memory": {"cpu": "1500KB"},
    },
}


def write_folder(folder: Path, size: str, vocab_size: int | None) -> None:
    """A published folder of bfloat16 zeros whose files are holes behind their headers."""
    from expertmesh.convert.openmoe import layout
    from expertmesh.hf import OpenMoeConfig
    from expertmesh.models import decoder_preset

    shape = {} if vocab_size is None else {"vocab_size": vocab_size}
    config = decoder_preset(f"openmoe-{size}", **shape)
    OpenMoeConfig.of(config, dtype="bfloat16").save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, dims in layout(config).their_shapes.items():
        num_bytes = _bytes(dims)
        if num_bytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = dims
        room -= num_bytes
    place: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        _write_holes(folder / file, shard)
        place |= dict.fromkeys(shard, file)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": place}))


def _write_holes(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in shapes.items():
        begin, end = end, end + _bytes(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(words)) + words)
        out.truncate(8 + len(words) + end)


def _bytes(dims: tuple[int, ...]) -> int:
    count = 2
    for length in dims:
        count *= length
    return count


def measure(setting: dict[str, Any]) -> dict[str, Any]:
    """Load and write in this process."""
    import torch

    from expertmesh.hf import OpenMoeForCausalLM

    memory = setting.get("max_memory")
    if memory is not None:
        memory = {int(d) if d.isdigit() else d: size for d, size in memory.items()}
    with tempfile.TemporaryDirectory() as scratch, _HostMemory() as host:
        folder = Path(scratch, "model")
        folder.mkdir()
        write_folder(folder, setting["size"], setting.get("vocab_size"))
        start = time.perf_counter()
        model = OpenMoeForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, setting.get("dtype", "bfloat16")),
            device_map=setting.get("device", 0) if memory is None else "auto",
            max_memory=memory,
            offload_folder=Path(scratch, "offload"),
        )
        loaded = time.perf_counter() - start
        with_gpu = any(param.is_cuda for param in model.parameters())
        after_load = torch.cuda.max_memory_allocated() / GB if with_gpu else None
        ids = torch.zeros(1, 8, dtype=torch.int64, device="cuda" if with_gpu else "cpu")
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        devices = getattr(model, "hf_device_map", {}).values()
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "devices": sorted({str(device) for device in devices}),
            "new_tokens": made.shape[1] - ids.shape[1],
            "gpu_gb_load": after_load,
            "gpu_gb": torch.cuda.max_memory_allocated() / GB if with_gpu else None,
            "host_gb": host.most / GB,
            "seconds_load": loaded,
        }


class _HostMemory:
    """The most memory of this process that is no file's, looked at twenty times a second."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_HostMemory":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.most = max(self.most, int(line.split()[1]) * 1024)


def measure_all(
    settings: dict[str, dict[str, Any]], keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Every setting in a process of its own; one that fails is a result too.

    Args:
        settings: By name.
        keep: Is given what there is after each setting: a run may be cut.
    """
    results: dict[str, Any] = {}
    for name, setting in settings.items():
        command = [sys.executable, __file__, "--setting", json.dumps(setting)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            results[name] = {**setting, "error": _error(done.returncode, done.stderr)}
        else:
            results[name] = {**setting, **json.loads(done.stdout.splitlines()[-1])}
        print(f"{name}: {results[name]}", flush=True)
        keep(results)
    return results


def _error(status: int, stderr: str) -> str:
    """The last line; a process that was killed leaves none, or one that does not say so."""
    lines = stderr.strip().splitlines()
    if status < 0:
        return f"killed by signal {-status}, {signal.strsignal(-status)}"
    return lines[-1] if lines else f"ended with status {status}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, not saved")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setting is not None:
        print(json.dumps(measure(arguments.setting)))
        return
    if arguments.tiny:
        measure_all(TINY, lambda _: None)
        return
    measure_all({name: SETTINGS[name] for name in arguments.only}, _keep)
    print(f"written to {RESULTS / NAME}.json")


def _keep(found: dict[str, Any]) -> None:
    old = load_if_there(NAME)
    settings = old.get("settings", {}) | found
    rest = [name for name in settings if name not in found]
    about = {"published_gb": PUBLISHED_GB, "new_tokens": NEW_TOKENS}
    ordered = {name: settings[name] for name in SETTINGS if name in settings}
    save(NAME, {**about, "settings": ordered}, kept=stamps_of(old, rest))


if __name__ == "__main__":
    main()
