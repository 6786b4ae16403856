"""Results with what they depend on: hardware, versions, commit, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "expertmesh",
    "torch",
    "transformers",
    "accelerate",
    "triton",
    "numpy",
    "sonic-moe",
    "quack-kernels",
    "scattermoe",
    "liger-kernel",
    "torchtitan",
)
"""Those whose version a figure may depend on, where they are installed."""

MEASURED_WITH = (":/expertmesh", ":/benchmarks", ":/tests/distributed")
RESULTS_APART = ":(top,exclude)benchmarks/results"
_STAMP = ("command", "date", "commit", "hardware", "versions")
_MOST_NAMED = 12


def save(
    name: str,
    results: dict[str, Any],
    folder: Path = RESULTS,
    *,
    kept: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write ``results/<name>.json``: the results below what they were measured on.

    Args:
        name: File name without its ending.
        results: Anything JSON holds.
        folder: Where to.
        kept: Of the parts that earlier runs measured, what they were measured on; see
            ``stamps_of``.

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
        **({"earlier": list(kept)} if kept else {}),
        **results,
    }
    # Replaced whole: a run that is cut while it writes leaves what it wrote before.
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What ``save`` wrote."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def load_if_there(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The same; empty where nothing was saved."""
    return load(name, folder) if (folder / f"{name}.json").exists() else {}


def stamps_of(old: dict[str, Any], parts: Iterable[str]) -> list[dict[str, Any]]:
    """What parts of an earlier result were measured on, for a file that keeps them.

    Args:
        old: The earlier file's content.
        parts: Names of what is kept of it.

    Returns:
        Commands with commit, date, hardware and versions; ``of`` names their parts. A part that
        the earlier file kept itself has the stamp that it had there, the others have the file's.
    """
    rest, found = list(parts), []
    for stamp in old.get("earlier", ()):
        own = [part for part in rest if part in stamp["of"]]
        rest = [part for part in rest if part not in own]
        found += [stamp | {"of": own}] if own else []
    if rest:
        found.append({key: old[key] for key in _STAMP} | {"of": rest})
    return found


def machine(hardware: dict[str, Any]) -> str:
    """GPUs, or processor and threads."""
    return ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['threads']} threads"


def made_by(
    result: dict[str, Any],
    *words: str,
    where: Callable[[dict[str, Any]], str] = machine,
) -> str:
    """A line for a page: where figures come from; one more for each earlier run's.

    Args:
        result: What ``load`` returned.
        words: To be said behind torch's version.
        where: From the hardware to words.
    """
    lines = [_stamp_text(result, words, where)]
    for stamp in result.get("earlier", ()):
        text = _stamp_text(stamp, words, where)
        lines.append(f"From an earlier run, {text}: {_named(stamp['of'])}")
    return "\n\n".join(lines) + "\n"


def _named(parts: Sequence[str]) -> str:
    """All of them, or where they are many, how many there are of each ``"name: ..."``."""
    if len(parts) <= _MOST_NAMED:
        return ", ".join(parts)
    counts = Counter(part.partition(": ")[0] for part in parts)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _stamp_text(
    stamp: dict[str, Any], words: Sequence[str], where: Callable[[dict[str, Any]], str]
) -> str:
    commit, plus, changes = stamp["commit"].partition("+")
    torch_version = f"torch {stamp['versions']['torch']}"
    cells = (
        f"`{stamp['command']}`",
        f"commit {commit[:10]}{plus}{changes}",
        where(stamp["hardware"]),
        torch_version,
        *words,
        stamp["date"][:10],
    )
    return ", ".join(cells)


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
    for package in PACKAGES:
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
    """The commit, with ``+changes`` where what figures are measured with differs from it.

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
    changed = git("status", "--porcelain", "--", *MEASURED_WITH, RESULTS_APART)
    return f"{commit}+changes" if changed else commit


def _relative(word: str) -> str:
    path, root = Path(word), RESULTS.parent.parent
    inside = path.is_absolute() and path.is_relative_to(root)
    return str(path.relative_to(root)) if inside else word
