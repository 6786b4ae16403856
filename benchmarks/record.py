"""Results with what they depend on: hardware, versions, commit, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def save(name: str, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``results/<name>.json``: the results below what they were measured on.

    Args:
        name: File name without its ending.
        results: Anything JSON holds.
        folder: Where to.

    Returns:
        The file's path.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    record = {
        "command": shlex.join(["python", *(_relative(word) for word in sys.argv)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "hardware": hardware(),
        "versions": versions(),
        **results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def hardware() -> dict[str, Any]:
    """Processor, cores, threads and GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("expertmesh", "torch", "transformers", "triton", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit, with ``+changes`` where the working tree differs from it.

    On a machine that holds a copy without its history, ``EXPERTMESH_COMMIT`` says it.
    """
    if told := os.environ.get("EXPERTMESH_COMMIT"):
        return told

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", "HEAD") or "none"
    return f"{commit}+changes" if git("status", "--porcelain", ":/expertmesh") else commit


def _relative(word: str) -> str:
    path, root = Path(word), RESULTS.parent.parent
    inside = path.is_absolute() and path.is_relative_to(root)
    return str(path.relative_to(root)) if inside else word
