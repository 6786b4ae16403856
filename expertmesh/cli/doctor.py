"""``expertmesh doctor``: what this machine offers, and what the library would choose on it."""

import argparse
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from expertmesh.kernels.backends import Problem

HELP = "show what is installed, which backends run here, and what auto picks"


def main(argv: list[str]) -> int:
    """Print the tables.

    Args:
        argv: Arguments after the command's name.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="expertmesh doctor", description=HELP)
    parser.parse_args(argv)
    from rich.console import Console

    # Brackets in what backends say, as in expertmesh[gpu], are text.
    console = Console(markup=False)
    for table in (_machine(), _choices(), _backends(), _extras()):
        console.print(table)
    return 0


def _table(title: str, *columns: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _machine() -> "Table":
    import torch

    table = _table("This machine", "what", "value")
    table.add_row("expertmesh", _version("expertmesh") or "not installed, run from its folder")
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("system", platform.platform())
    table.add_row("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    table.add_row("oneDNN", "yes" if torch.backends.mkldnn.is_available() else "no")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        about = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        table.add_row(f"cuda:{index}", f"{about}, compute capability {device.major}.{device.minor}")
    if torch.cuda.device_count() == 0:
        built = torch.version.cuda
        why = f"none visible to CUDA {built}" if built else "this torch is built without CUDA"
        table.add_row("GPU", why)
    return table


def _devices() -> "list[torch.device]":
    import torch

    found = [torch.device("cpu")]
    return [*found, torch.device("cuda")] if torch.cuda.is_available() else found


def _problems() -> "Iterator[tuple[str, Problem]]":
    import torch

    from expertmesh.kernels.backends import Problem

    uses = {"training, 4096 tokens": (16384, True), "decoding, 1 token": (4, False)}
    for device in _devices():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for use, (num_assignments, needs_grad) in uses.items():
                yield (
                    use,
                    Problem(
                        device=device,
                        dtype=dtype,
                        num_experts=32,
                        num_assignments=num_assignments,
                        dim=256,
                        hidden=512,
                        needs_grad=needs_grad,
                    ),
                )


def _choices() -> "Table":
    from expertmesh.kernels.backends import explain
    from expertmesh.kernels.moe_mlp import MLP_BACKENDS

    title = "What auto picks for the experts (E=32, K=4, D=256, F=512)"
    table = _table(title, "device", "dtype", "use", "backend", "why not the others")
    for use, problem in _problems():
        explanation = explain(MLP_BACKENDS, problem)
        reasons = [f"{name}: {why}" for name, why in explanation.reasons.items()]
        dtype = str(problem.dtype).removeprefix("torch.")
        chosen = explanation.chosen.name
        table.add_row(str(problem.device), dtype, use, chosen, "\n".join(reasons))
    return table


def _backends() -> "Table":
    from expertmesh.kernels.moe_mlp import MLP_BACKENDS

    table = _table("Backends of the experts", "name", "what it is", "runs here")
    problems = [problem for _, problem in _problems()]
    for backend in MLP_BACKENDS:
        able, reasons = [], []
        for problem in problems:
            reason = backend.refusal(problem)
            name = f"{problem.device} {str(problem.dtype).removeprefix('torch.')}"
            if reason is None and name not in able:
                able.append(name)
            elif reason is not None and reason not in reasons:
                reasons.append(reason)
        lines = [", ".join(able) or "no", *(f"not: {reason}" for reason in reasons)]
        table.add_row(backend.name, backend.summary, "\n".join(lines))
    return table


def _extras() -> "Table":
    table = _table("Optional packages", "extra", "package", "version")
    for extra, packages in _packages_by_extra().items():
        missing = False
        for package in packages:
            version = _version(package)
            missing = missing or version is None
            table.add_row(extra, package, version or "missing")
        if missing:
            table.add_row(extra, "", f"pip install 'expertmesh[{extra}]'")
    return table


def _packages_by_extra() -> dict[str, list[str]]:
    """Package names by extra, from the metadata that pip installed."""
    try:
        required = metadata.requires("expertmesh") or []
    except metadata.PackageNotFoundError:
        return {}
    extras: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name and name.group() != "expertmesh":
            extras.setdefault(extra.group(1), []).append(name.group())
    return extras


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
