"""Starts the kernels: grids, descriptors, and the products that torch computes instead."""

from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.layout import Layout
from expertmesh.kernels.moe_mlp.fused.dhidden import dhidden_kernel
from expertmesh.kernels.moe_mlp.fused.dweight import dweight_kernel
from expertmesh.kernels.moe_mlp.fused.plan import Gather, Quack, Tile, Turns
from expertmesh.kernels.moe_mlp.fused.rows import rows_kernel
from expertmesh.kernels.moe_mlp.fused.sums import (
    expert_sum_kernel,
    share_sum_kernel,
    spread_kernel,
)
from expertmesh.kernels.moe_mlp.fused.up import up_kernel


def up_project(
    x_RD: Tensor,
    up_EPFD: Tensor,
    bias: Tensor | None,
    layout: Layout,
    choices: int,
    activation: str,
    tile: Tile,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Hidden units ``(N, F)`` of every grouped row, and the pre-activation if it is kept."""
    _, parts, hidden, dim = up_EPFD.shape
    num_assignments = layout.order_N.numel()
    hidden_NF = x_RD.new_empty(num_assignments, hidden)
    pre_NH = x_RD.new_empty((num_assignments, parts * hidden) if keep else (0,))
    block = [1, parts, tile.columns // parts, tile.depth]
    up_kernel[_grid(x_RD, tile)](
        x_RD,
        TensorDescriptor.from_tensor(up_EPFD, block),
        bias if bias is not None else x_RD,
        layout.order_N,
        layout.tile_P3,
        layout.num_tiles_1,
        pre_NH if keep else hidden_NF,
        hidden_NF,
        choices,
        dim,
        hidden,
        parts,
        activation,
        bias is not None,
        keep,
        tile.rows,
        tile.columns,
        tile.depth,
        tile.group,
        tile.flatten,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return hidden_NF, pre_NH


def multiply_rows(
    rows_NI: Tensor, weight: Tensor, layout: Layout, tile: Tile | Turns | None, *, transposed: bool
) -> Tensor:
    """Each grouped row times its expert's matrix.

    Args:
        rows_NI: ``(N, parts I)``.
        weight: ``(E, parts, I, O)``, or if ``transposed`` ``(E, 1, O, I)``.
        layout: Where the experts' rows lie.
        tile: None for torch's ``grouped_mm``.
        transposed: Whether the matrices stand as they are in ``linear``.

    Returns:
        ``(N, O)``; rows behind the last expert's hold anything.
    """
    if tile is None:
        matrix = weight.flatten(1, 2)
        matrix = matrix.mT if transposed else matrix
        return torch.nn.functional.grouped_mm(rows_NI, matrix, offs=layout.offset_E1[1:])
    if isinstance(tile, Turns):
        from expertmesh.kernels.moe_mlp.fused import launch_turns

        num_sms = _num_sms(rows_NI.device)
        return launch_turns.multiply_rows(
            rows_NI, weight, layout, tile, num_sms, transposed=transposed
        )
    parts, inner, outer = weight.shape[1:]
    if transposed:
        inner, outer = outer, inner
    cut = [tile.columns, tile.depth] if transposed else [tile.depth, tile.columns]
    out_NO = rows_NI.new_empty(rows_NI.shape[0], outer)
    rows_kernel[_grid(rows_NI, tile)](
        TensorDescriptor.from_tensor(rows_NI, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(weight, [1, 1, *cut]),
        layout.tile_P3,
        layout.num_tiles_1,
        out_NO,
        inner,
        outer,
        parts,
        transposed,
        tile.flatten,
        tile.rows,
        tile.columns,
        tile.depth,
        tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_NO


def hidden_gradient(
    dy_RD: Tensor,
    down_EDF: Tensor,
    weight_RK: Tensor,
    pre_NH: Tensor,
    layout: Layout,
    activation: str,
    tile: Tile | Turns,
    *,
    dy_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the pre-activation, weighted hidden units, shares of the weights' gradient.

    ``dy_ND`` holds the grouped rows of ``dy_RD``, which ``Turns`` read that do not gather.
    """
    if isinstance(tile, Turns):
        from expertmesh.kernels.moe_mlp.fused import launch_turns

        num_sms = _num_sms(dy_RD.device)
        dy = dy_RD if tile.gather else dy_ND
        assert dy is not None
        return launch_turns.hidden_gradient(
            dy, down_EDF, weight_RK, pre_NH, layout, activation, tile, num_sms
        )
    num_experts, dim, hidden = down_EDF.shape
    num_assignments = pre_NH.shape[0]
    dpre_NH = torch.empty_like(pre_NH)
    hidden_NF = pre_NH.new_empty(num_assignments, hidden)
    blocks = ceil_div(hidden, tile.columns)
    share_NB = pre_NH.new_empty(num_assignments, blocks, dtype=torch.float32)
    dhidden_kernel[_grid(dy_RD, tile)](
        dy_RD,
        TensorDescriptor.from_tensor(down_EDF.unsqueeze(1), [1, 1, tile.depth, tile.columns]),
        weight_RK,
        layout.order_N,
        layout.offset_E1,
        layout.tile_P3,
        layout.num_tiles_1,
        pre_NH,
        dpre_NH,
        hidden_NF,
        share_NB,
        num_assignments,
        num_experts,
        weight_RK.shape[1],
        dim,
        hidden,
        pre_NH.shape[1] // hidden,
        activation,
        tile.rows,
        tile.columns,
        tile.depth,
        tile.group,
        tile.chunks,
        tile.flatten,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **({} if tile.registers is None else {"maxnreg": tile.registers}),
    )
    return dpre_NH, hidden_NF, share_NB


def weight_gradient(
    rows_NH: Tensor,
    by_token_RO: Tensor,
    layout: Layout,
    choices: int,
    like: Tensor,
    tile: Tile | Gather | Quack | None,
    *,
    flipped: bool,
    gathered_NO: Tensor | None = None,
) -> Tensor:
    """Each expert's ``rows^T by_token``.

    Args:
        rows_NH: Grouped rows, zero behind the last expert's.
        by_token_RO: What the rows came from, by token.
        layout: Where the experts' rows lie.
        choices: K.
        like: The matrices, ``(E, P, H / P, O)``, or if ``flipped`` ``(E, O, H)``; a ``Tile``
            and ``Gather`` take any strides but for the last dim, which is contiguous.
        tile: None for torch's ``grouped_mm`` over a copy of the rows by position.
        flipped: How the matrices stand.
        gathered_NO: The copy by position, if there is one already.

    Returns:
        The gradient, shaped and laid out as ``like``; zero for an expert without rows.
    """
    if tile is None:
        if gathered_NO is None:
            gathered_NO = spread(by_token_RO, layout)
        left, right = (gathered_NO, rows_NH) if flipped else (rows_NH, gathered_NO)
        grouped_mm = torch.nn.functional.grouped_mm
        grad = grouped_mm(left.t(), right, offs=layout.offset_E1[1:]).view(like.shape)
        return grad if like.is_contiguous() else torch.empty_like(like).copy_(grad)
    if isinstance(tile, Gather):
        from expertmesh.kernels.moe_mlp.fused import launch_gather

        num_sms = _num_sms(rows_NH.device)
        return launch_gather.weight_gradient(
            rows_NH, by_token_RO, layout, choices, like, tile, num_sms, flipped=flipped
        )
    if isinstance(tile, Quack):
        from expertmesh.kernels.moe_mlp.fused import launch_quack

        return launch_quack.weight_gradient(
            rows_NH, by_token_RO, layout, choices, like, tile, flipped=flipped
        )
    grad = torch.empty_like(like)
    out_EPIO = grad.mT.unsqueeze(1) if flipped else grad
    num_experts, parts, inner, outer = out_EPIO.shape
    dweight_kernel[_grid(rows_NH, tile)](
        TensorDescriptor.from_tensor(rows_NH, [tile.depth, tile.rows]),
        by_token_RO,
        layout.order_N,
        layout.offset_E1,
        layout.longest_E,
        out_EPIO,
        *out_EPIO.stride(),
        num_experts,
        choices,
        inner,
        outer,
        parts,
        flipped,
        tile.rows,
        tile.columns,
        tile.depth,
        tile.group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return grad


def spread(by_token_RO: Tensor, layout: Layout) -> Tensor:
    """Rows by grouped position, ``(N, O)``; those behind the last expert's hold anything.

    Written token by token: a row is read once for all its choices.
    """
    num_rows, width = by_token_RO.shape
    num_assignments = layout.inverse_N.numel()
    columns = min(4096, power_of_2(width))
    out_NO = by_token_RO.new_empty(num_assignments, width)
    spread_kernel[(num_rows, ceil_div(width, columns))](
        by_token_RO,
        layout.inverse_N,
        out_NO,
        num_assignments // num_rows,
        width,
        columns,
        num_warps=max(1, min(8, columns // 256)),
    )
    return out_NO


def sum_shares(share_NB: Tensor, inverse_N: Tensor, out_RK: Tensor) -> Tensor:
    """Fill ``out_RK`` with the gradient of the combine weights."""
    rows, blocks = 256, share_NB.shape[1]
    share_sum_kernel[(ceil_div(inverse_N.numel(), rows),)](
        share_NB,
        inverse_N,
        out_RK,
        inverse_N.numel(),
        blocks,
        rows,
        power_of_2(blocks),
    )
    return out_RK


def sum_experts(
    rows: Tensor, layout: Layout, num_experts: int, *, weight_RK: Tensor | None = None
) -> Tensor:
    """Sum of each expert's rows, ``(E, width)``: grouped ones, or weighted rows by token."""
    width, columns = rows.shape[1], 64
    out = rows.new_empty(num_experts, width)
    expert_sum_kernel[(num_experts, ceil_div(width, columns))](
        rows,
        layout.order_N,
        weight_RK if weight_RK is not None else rows,
        layout.offset_E1,
        out,
        1 if weight_RK is None else weight_RK.shape[1],
        width,
        weight_RK is not None,
        64,
        columns,
    )
    return out


def _grid(like: Tensor, tile: Tile) -> tuple[int]:
    return (tile.per_sm * _num_sms(like.device),)


@cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: programs run one after another
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
