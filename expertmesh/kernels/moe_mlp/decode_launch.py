"""Launches of the ``decode`` backend's kernels, and how their work is cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.dependent import options
from expertmesh.kernels.moe_mlp.decode_kernels import (
    combine_kernel,
    down_experts_kernel,
    down_rows_kernel,
    group_kernel,
    up_experts_kernel,
    up_rows_kernel,
)


class Vectors(NamedTuple):
    """How products of one vector are cut.

    Attributes:
        out: Output units of a program.
        inner: Width of one step along the sum.
        warps: Warps of a program.
    """

    out: int
    inner: int
    warps: int


class Tiles(NamedTuple):
    """How products of an expert's rows are cut.

    Attributes:
        out: Output units of a program.
        rows: Rows that a program multiplies at a time.
        inner: Width of one step along the sum.
        stages: Steps whose loads are under way.
        warps: Warps of a program.
        splits: Programs that share one sum; their parts are added afterwards.
    """

    out: int
    rows: int
    inner: int
    stages: int
    warps: int
    splits: int = 1


UP_VECTORS = Vectors(out=1, inner=1024, warps=4)


def down_vectors(hidden: int) -> Vectors:
    """For the down projection of experts of width ``hidden``."""
    return Vectors(8, 1024, 4) if hidden > 2048 else Vectors(2, 512, 2)


def up_tiles(expert_RK: Tensor, num_experts: int, parts: int) -> Tiles:
    """For an up projection of so many parts."""
    rows = _rows(expert_RK, num_experts)
    # Tiles of three matrices fill the shared memory sooner, in float32 with five steps.
    fewer = 2 if parts == 3 else 0
    return Tiles(64, rows, 64, stages=(6 if rows < 64 else 4) - fewer, warps=4)


def down_tiles(expert_RK: Tensor, num_experts: int, dim: int, hidden: int) -> Tiles:
    """For the down projection; sums are shared where programs would be few and long."""
    programs = min(expert_RK.numel(), num_experts) * ceil_div(dim, 64)
    splits = min(2 if hidden >= 2048 else 1, ceil_div(1024, programs))
    return Tiles(64, _rows(expert_RK, num_experts), 128, stages=3, warps=4, splits=splits)


def _rows(expert_RK: Tensor, num_experts: int) -> int:
    """Twice the mean, so that few experts need a second turn, which reads their weights again."""
    mean = ceil_div(expert_RK.numel(), num_experts)
    return min(64, max(16, power_of_2(2 * mean)))


def group(expert_RK: Tensor, order_N: Tensor, offset_E1: Tensor) -> None:
    """Write which assignment stands at each grouped position, and where experts start."""
    num, num_experts, block = expert_RK.numel(), len(offset_E1) - 1, 32
    group_kernel[(ceil_div(max(num, num_experts + 1), block),)](
        expert_RK,
        order_N,
        offset_E1,
        num,
        num_experts,
        block,
        max(16, power_of_2(num)),
        **options(expert_RK),
    )


def up_rows(
    x_RD: Tensor,
    expert_RK: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    hidden_NF: Tensor,
    cut: Vectors = UP_VECTORS,
) -> None:
    """Write hidden units by assignment."""
    (R, K), (E, *_, F, D) = expert_RK.shape, up.shape
    up_rows_kernel[(R * K, ceil_div(F, cut.out))](
        x_RD,
        expert_RK,
        up,
        bias,
        hidden_NF,
        E,
        F,
        K,
        D,
        *_strides(up),
        _parts(up),
        activation,
        bias is not None,
        cut.out,
        min(cut.inner, power_of_2(D)),
        **options(x_RD, cut.warps),
    )


def up_experts(
    x_RD: Tensor,
    expert_RK: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    order_N: Tensor,
    offset_E1: Tensor,
    hidden_NF: Tensor,
    cut: Tiles | None = None,
) -> None:
    """Write hidden units by grouped position, otherwise as ``up_rows``."""
    (_, K), (E, *_, F, D) = expert_RK.shape, up.shape
    parts = _parts(up)
    cut = up_tiles(expert_RK, E, parts) if cut is None else cut
    up_experts_kernel[(ceil_div(F, cut.out), E)](
        x_RD,
        order_N,
        offset_E1,
        up,
        bias,
        hidden_NF,
        F,
        K,
        D,
        *_strides(up),
        parts,
        activation,
        bias is not None,
        _precision(x_RD),
        cut.out,
        cut.rows,
        cut.inner,
        cut.stages,
        **options(x_RD, cut.warps),
    )


def down_rows(
    hidden_NF: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    order_N: Tensor,
    offset_E1: Tensor,
    down_EDF: Tensor,
    bias_ED: Tensor | None,
    y_RD: Tensor,
    cut: Vectors | None = None,
) -> None:
    """Write the output from hidden units by assignment; the tables are empty."""
    (R, K), (E, D, F) = expert_RK.shape, down_EDF.shape
    cut = down_vectors(F) if cut is None else cut
    down_rows_kernel[(R, ceil_div(D, cut.out))](
        hidden_NF,
        expert_RK,
        weight_RK,
        down_EDF,
        bias_ED,
        y_RD,
        E,
        D,
        K,
        F,
        bias_ED is not None,
        cut.out,
        min(cut.inner, power_of_2(F)),
        **options(hidden_NF, cut.warps),
    )


def down_experts(
    hidden_NF: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    order_N: Tensor,
    offset_E1: Tensor,
    down_EDF: Tensor,
    bias_ED: Tensor | None,
    y_RD: Tensor,
    cut: Tiles | None = None,
) -> None:
    """Write the output from hidden units by grouped position."""
    (R, K), (E, D, F) = expert_RK.shape, down_EDF.shape
    cut = down_tiles(expert_RK, E, D, F) if cut is None else cut
    partial_SND = hidden_NF.new_empty(cut.splits, R * K, D, dtype=torch.float32)
    down_experts_kernel[(ceil_div(D, cut.out), E, cut.splits)](
        hidden_NF,
        order_N,
        offset_E1,
        down_EDF,
        bias_ED,
        partial_SND,
        R * K,
        D,
        F,
        bias_ED is not None,
        _precision(hidden_NF),
        cut.splits,
        cut.out,
        cut.rows,
        cut.inner,
        cut.stages,
        **options(hidden_NF, cut.warps),
    )
    block = min(1024, power_of_2(D))
    combine_kernel[(R, ceil_div(D, block))](
        partial_SND,
        expert_RK,
        weight_RK,
        y_RD,
        R * K,
        E,
        D,
        K,
        cut.splits,
        block,
        **options(hidden_NF),
    )


def _parts(up: Tensor) -> int:
    return up.shape[1] if up.dim() == 4 else 1


def _strides(up: Tensor) -> tuple[int, int, int]:
    """Of an expert, from one part to the next, and of a unit."""
    return up.stride(0), up.stride(1) if up.dim() == 4 else 0, up.stride(-2)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"  # ignored for narrower types
