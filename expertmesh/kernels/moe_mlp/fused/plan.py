"""Tiles and providers of the fused products: measured ones for known shapes, a rule for others.

Nothing is measured while a model runs: the choice is a function of the shapes alone, so results
are too. ``benchmarks/tune_fused.py`` measures the candidates and writes the table that is shipped.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from expertmesh.kernels.triton_support import TRITON_VERSION, capability

SHIPPED = Path(__file__).with_name("h200.json")

_MANY_ROWS = 64  # per expert; below, tiles of 128 rows are mostly empty
_WIDE_SUM = 2048  # columns from which a copy by position costs less than gathering in the product
_WIDE_TURNS = 512  # hidden units from which a copy of the output's gradient pays
_GLUON = "3.6."  # whose language the specialised kernels are written in; it is not stable yet
_MOST_GROUPS = 1024  # where grouped_mm leaves its fast path


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its product.

    Attributes:
        columns: Columns of the output tile; of the up projection, of both halves together.
        depth: Elements of the summed dim per step.
        warps: Warps of a program.
        stages: Steps in flight.
        per_sm: Programs on a multiprocessor.
        group: Row tiles that sweep the columns together.
        rows: Rows of the output tile, where it is not the plan's.
        chunks: Parts in which the elementwise work behind a product is done.
        registers: Limit per thread, or None.
        flatten: Whether the next tile's loads start before this one is stored.
    """

    columns: int
    depth: int
    warps: int
    stages: int
    per_sm: int = 1
    group: int = 8
    rows: int = 128
    chunks: int = 1
    registers: int | None = None
    flatten: bool = False


@dataclass(frozen=True)
class Turns:
    """How two warpgroups take turns in a product of grouped rows (Gluon).

    Attributes:
        group: Row tiles that sweep the columns together.
        stages: Steps in flight.
        gather: Whether further warps gather the rows by token; else they lie grouped in memory.
            For the pre-activation's gradient, which needs a copy otherwise.
        columns: Columns of the output tile; how it is finished is written for these.
        depth: Elements of the summed dim per step.
        rows: Rows of the output tile; likewise.
    """

    group: int = 4
    stages: int = 6
    gather: bool = False
    columns: ClassVar[int] = 128
    depth: ClassVar[int] = 64
    rows: ClassVar[int] = 128


@dataclass(frozen=True)
class Gather:
    """How a gradient of matrices is cut whose rows by token are gathered by further warps (Gluon).

    Attributes:
        gathered: Width of the tile on the side of those rows.
        grouped: Width on the side of the grouped rows. One is 128, the other 256.
        group: Row tiles that sweep the columns together.
        stages: Steps in flight.
        depth: Elements of the summed dim per step.
    """

    gathered: int = 128
    grouped: int = 256
    group: int = 4
    stages: ClassVar[int] = 4
    depth: ClassVar[int] = 64


@dataclass(frozen=True)
class Quack:
    """How QuACK, an optional package, cuts a gradient of matrices; it gathers the rows itself.

    Attributes:
        rows: Rows of the output tile.
        columns: Columns of the output tile.
        pingpong: Whether two warpgroups take turns; else they share a tile.
        cluster: Tiles, one below the other, that read the same columns together.
    """

    rows: int = 128
    columns: int = 256
    pingpong: bool = False
    cluster: int = 2
    depth: ClassVar[int] = 64


@dataclass(frozen=True)
class Plan:
    """One tile for each product; None leaves it to ``torch.nn.functional.grouped_mm``.

    A gradient of matrices that is left to it costs a copy of the rows by position. So does the
    pre-activation's by turns that do not gather; the down projection's then shares it if left so.

    Attributes:
        rows: Rows of a tile of grouped rows.
        up: Up projection.
        down: Down projection.
        dhidden: Gradient of the pre-activation.
        dx: Gradient of the rows.
        dup: Gradient of the up projection's matrices.
        ddown: Gradient of the down projection's matrices.
    """

    rows: int
    up: Tile
    down: Tile | Turns | None
    dhidden: Tile | Turns
    dx: Tile | Turns | None
    dup: Tile | Gather | Quack | None
    ddown: Tile | Gather | Quack | None


def plan_for(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_experts: int,
    num_assignments: int,
    dim: int,
    hidden: int,
    parts: int,
    packed: bool,
    quack: bool = False,
) -> Plan:
    """The plan of a shape: the rule's, with what was measured for it on this device put in.

    Args:
        device: Where it runs.
        dtype: Of the products.
        num_experts: E.
        num_assignments: N.
        dim: D.
        hidden: F.
        parts: 2 for gated experts, else 1.
        packed: Whether the up projection's matrices lie in memory without gaps.
        quack: Whether QuACK's products may be taken.
    """
    rows = 128 if num_assignments >= _MANY_ROWS * num_experts else 64
    plan = default_plan(dtype, rows, dim=dim, hidden=hidden, parts=parts)
    refusal = turns_refusal(device, dtype, rows=rows, dim=dim, hidden=hidden, packed=packed)
    turns = refusal is None
    if turns:
        plan = specialised(plan, dtype, hidden)
    if rows == 128 and dtype == torch.bfloat16 and parts == 2 and device.type == "cuda":
        measured = _shipped(_device_name(device.index)).get(f"{dim}x{hidden}", {})
        tiles: dict[str, Any] = {name: _tile(fields) for name, fields in measured.items()}
        able = {name: t for name, t in tiles.items() if turns or not isinstance(t, (Turns, Gather))}
        plan = replace(plan, **able)
    if num_experts >= _MOST_GROUPS:
        sums = default_plan(torch.float16, rows, dim=dim, hidden=hidden, parts=parts)
        plan = replace(plan, dup=plan.dup or sums.dup, ddown=plan.ddown or sums.ddown)
    return with_quack(plan) if quack and packed and rows == 128 else plan


def default_plan(dtype: torch.dtype, rows: int, *, dim: int, hidden: int, parts: int) -> Plan:
    """What a shape without measurements gets: what won most often on an H200.

    Tiles of 128 x 256 x 64 whose loads run ahead of the stores; two smaller programs on a
    multiprocessor where the work behind the product is long; for the sums over rows, gathers on
    the narrow side, or a copy where it is small beside the product. float32 is cut into
    three TF32 products, which take more of everything.
    """
    if dtype == torch.float32:
        small = Tile(columns=64, depth=32, warps=4, stages=2, rows=64)
        return Plan(rows=64, up=small, down=small, dhidden=small, dx=small, dup=small, ddown=small)
    tile = Tile(columns=256, depth=64, warps=8, stages=3, rows=rows, flatten=True)
    columns = _fit(hidden, 128)
    dhidden = replace(
        tile, columns=columns, per_sm=2, chunks=columns // 32, registers=128, flatten=False
    )
    sums = Tile(
        columns=_fit(dim, 128), depth=64, warps=8, stages=5, rows=_fit(hidden, 256), group=4
    )
    copied = _WIDE_SUM if dtype == torch.bfloat16 else math.inf
    return Plan(
        rows=rows,
        up=replace(tile, columns=_fit(parts * hidden, 256)),
        down=replace(tile, columns=_fit(dim, 256)),
        dhidden=dhidden,
        dx=replace(tile, columns=_fit(dim, 256)),
        dup=None if parts * hidden >= copied else sums,
        ddown=None if hidden >= copied else sums,
    )


def specialised(plan: Plan, dtype: torch.dtype, hidden: int) -> Plan:
    """The plan with specialised warps where they won: nearly everywhere behind the up projection.

    The pre-activation's gradient of narrow experts gathers its rows on the way: they have more rows
    to copy for each number that is computed from them. Of wide ones the copy is faster, and with it
    ``grouped_mm`` for the down projection's matrices.
    """
    narrow = hidden < _WIDE_TURNS
    plan = replace(plan, down=Turns(), dhidden=Turns(gather=narrow), dx=Turns(), dup=Gather())
    return replace(plan, ddown=Gather() if narrow or dtype != torch.bfloat16 else None)


def with_quack(plan: Plan) -> Plan:
    """The plan with QuACK's products in the place of plain tiles that gather rows.

    Where specialised warps serve, none is left, and they are as fast. Elsewhere, with another
    Triton or widths that tiles do not divide, those are in bfloat16 the gradients of narrow
    experts' matrices: of wide ones a copy of the rows is small beside the product, and
    ``grouped_mm`` on it as fast. In float16, which was not measured, they are all.
    """
    dup = Quack() if isinstance(plan.dup, Tile) else plan.dup
    ddown = Quack() if isinstance(plan.ddown, Tile) else plan.ddown
    return replace(plan, dup=dup, ddown=ddown)


def turns_refusal(
    device: torch.device, dtype: torch.dtype, *, rows: int, dim: int, hidden: int, packed: bool
) -> str | None:
    """Why no product of a shape goes by turns; None if they may.

    Args:
        device: Where it runs.
        dtype: Of the products.
        rows: Of a tile.
        dim: D.
        hidden: F.
        packed: Whether the up projection's matrices lie in memory without gaps.
    """
    if dtype.itemsize != 2:
        return f"they take 16 bits, not {dtype}"
    if rows != Turns.rows:
        return f"experts have fewer than {_MANY_ROWS} rows in the mean"
    if dim % Turns.columns or hidden % Turns.columns:
        return f"dim and hidden must be multiples of {Turns.columns}, got {dim} and {hidden}"
    if not packed:
        return "the up projection's matrices do not lie one after another in memory"
    return _turns_refusal_here(device)


def _turns_refusal_here(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"they are for GPUs, this is {device.type}"
    major, minor = capability(device)
    if (major, minor) != (9, 0):
        return f"they are for compute capability 9.0, this device has {major}.{minor}"
    if not (TRITON_VERSION or "").startswith(_GLUON):
        return (
            f"they are written in Gluon, which changes from version to version, as it is in "
            f"Triton {_GLUON}*; installed is {TRITON_VERSION or 'an unknown one'}"
        )
    return None


def _fit(width: int, most: int) -> int:
    """The power of two that covers a width, from 64 to ``most``."""
    return min(most, max(64, 1 << (width - 1).bit_length()))


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _shipped(device_name: str) -> dict[str, dict[str, Any]]:
    if not SHIPPED.exists():
        return {}
    content: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    known: dict[str, dict[str, Any]] = content["plans"] if content["device"] == device_name else {}
    return known


def _tile(fields: dict[str, Any] | None) -> Tile | Turns | Gather | None:
    if fields is None:
        return None
    if "turns" in fields:
        return Turns(**fields["turns"])
    return Gather(**fields["gather"]) if "gather" in fields else Tile(**fields)
