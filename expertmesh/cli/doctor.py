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
    from expertmesh.kernels.moe_mlp.fused.plan import Gather, Quack, Tile, Turns

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

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            # By itself it would exit with 1, as if something had failed.
            raise BrokenPipeError

    # Brackets in what backends say, as in expertmesh[gpu], are text.
    console = Quiet(markup=False)
    for table in (_machine(), _choices(), _products(), _operations(), _backends(), _extras()):
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

    from expertmesh.kernels.triton_support import TRITON_VERSION

    table = _table("This machine", "what", "value")
    table.add_row("expertmesh", _version("expertmesh") or "not installed, run from its folder")
    table.add_row("python", platform.python_version())
    table.add_row("torch", torch.__version__)
    table.add_row("system", platform.platform())
    table.add_row("CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    table.add_row("oneDNN", "yes" if torch.backends.mkldnn.is_available() else "no")
    table.add_row("Triton", "not installed" if TRITON_VERSION is None else TRITON_VERSION or "?")
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

    for device in _devices():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            yield "training, 4096 tokens", _problem(device, dtype, 16384, needs_grad=True)
            yield "decoding, 1 token", _problem(device, dtype, 4, needs_grad=False)


def _problem(
    device: "torch.device", dtype: "torch.dtype", num_assignments: int, *, needs_grad: bool
) -> "Problem":
    from expertmesh.kernels.backends import Problem

    return Problem(
        device=device,
        dtype=dtype,
        num_experts=32,
        num_assignments=num_assignments,
        dim=256,
        hidden=512,
        needs_grad=needs_grad,
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


def _products() -> "Table":
    """Which kernels the fused backends are made of here, and what some of them lack."""
    import torch

    from expertmesh.kernels.moe_mlp.fused.plan import plan_for, turns_refusal
    from expertmesh.kernels.moe_mlp.quack import QuackMLP
    from expertmesh.kernels.moe_mlp.triton import TritonMLP

    title = "Kernels behind triton and quack (training, bfloat16)"
    table = _table(title, "device", "product", "kernel")
    for device in _devices():
        problem = _problem(device, torch.bfloat16, 16384, needs_grad=True)
        reason = TritonMLP().refusal(problem)
        if reason is not None:
            table.add_row(str(device), "all", f"none of them: {reason}")
            continue
        without_quack = QuackMLP().refusal(problem)
        dim, hidden = problem.dim, problem.hidden
        plan = plan_for(
            device,
            problem.dtype,
            num_experts=problem.num_experts,
            num_assignments=problem.num_assignments,
            dim=dim,
            hidden=hidden,
            parts=problem.num_parts,
            packed=True,
            quack=without_quack is None,
        )
        for product in ("up", "down", "dhidden", "dx", "dup", "ddown"):
            table.add_row(str(device), product, _kernel(getattr(plan, product)))
        without_turns = turns_refusal(
            device, problem.dtype, rows=plan.rows, dim=dim, hidden=hidden, packed=True
        )
        for kernels, refusal in (("Gluon", without_turns), ("QuACK's", without_quack)):
            use = "used where they are faster" if refusal is None else f"not used: {refusal}"
            table.add_row(str(device), f"{kernels} kernels", use)
    return table


def _kernel(tile: "Tile | Turns | Gather | Quack | None") -> str:
    from expertmesh.kernels.moe_mlp.fused.plan import Gather, Quack, Turns

    if tile is None:
        return "torch's grouped_mm over a copy of the rows by position"
    if isinstance(tile, Gather):
        cut = f"{tile.grouped} x {tile.gathered} x {tile.depth}"
        return f"Gluon, warps that gather rows, tiles of {cut}"
    gathering = ", others gather rows" if isinstance(tile, Turns) and tile.gather else ""
    languages = {Turns: f"Gluon, two warpgroups by turns{gathering}", Quack: "QuACK"}
    language = languages.get(type(tile), "Triton")
    return f"{language}, tiles of {tile.rows} x {tile.columns} x {tile.depth}"


def _operations() -> "Table":
    """The operations that have one fast implementation and one for everything else."""
    import torch

    from expertmesh.kernels.grouped_gemm.matmul import onednn_available
    from expertmesh.kernels.router import logits_refusal, statistics_refusal

    table = _table("Other operations", "device", "dtype", "operation", "what runs", "why")
    for device in _devices():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            refusal = logits_refusal(device, dtype, torch.float32, 32)
            runs = "torch operations" if refusal else "Triton kernels"
            table.add_row(str(device), name, "router's logits, choice, gates", runs, refusal or "")
        refusal = statistics_refusal(device, torch.float32, 32)
        runs = "torch operations" if refusal else "Triton kernels"
        table.add_row(str(device), "float32", "counters, balance losses", runs, refusal or "")
        table.add_row(str(device), "any", "cross-entropy", "torch, some tokens at a time", "")
    runs, why = ("oneDNN", "") if onednn_available() else ("torch.mm", "this torch has no oneDNN")
    table.add_row("cpu", "float32", "products of the backend loop", runs, why)
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
