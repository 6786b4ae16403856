"""Starts the kernel whose further warps gather rows."""

import torch
from torch import Tensor

from expertmesh.kernels.layout import Layout
from expertmesh.kernels.moe_mlp.fused.dweight_gather import dweight_gather_kernel
from expertmesh.kernels.moe_mlp.fused.launch_turns import REGISTERS_OF_FOUR, WARPS, descriptor
from expertmesh.kernels.moe_mlp.fused.plan import Gather


def weight_gradient(
    rows_NH: Tensor,
    by_token_RO: Tensor,
    layout: Layout,
    choices: int,
    like: Tensor,
    tile: Gather,
    num_sms: int,
    *,
    flipped: bool,
) -> Tensor:
    """As ``launch.weight_gradient``; the tile divides the width of the gathered rows.

    Those are the left operand if ``flipped``, else the right one: either way the tile's columns
    lie along the matrices' last dim.
    """
    assert by_token_RO.shape[1] % tile.gathered == 0, "columns beyond would be read"
    assert like.stride(-1) == 1, "rows of the result would be written as if they lay whole"
    grad = torch.empty_like(like)
    by_part_EPIO = grad.unsqueeze(1) if flipped else grad
    num_experts, parts, part, width = by_part_EPIO.shape
    rows, columns = tile.grouped, tile.gathered
    if flipped:
        rows, columns = columns, rows
    dweight_gather_kernel[(num_sms,)](
        descriptor(rows_NH, [tile.depth, tile.grouped]),
        by_token_RO,
        layout.order_N,
        layout.offset_E1,
        layout.longest_E,
        grad,
        *by_part_EPIO.stride()[:3],
        num_experts,
        choices,
        parts * part,
        part,
        width,
        rows,
        columns,
        flipped,
        tile.stages,
        tile.group,
        num_warps=2 * WARPS,
        maxnreg=REGISTERS_OF_FOUR,
    )
    return grad
