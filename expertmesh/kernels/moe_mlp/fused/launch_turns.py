"""Starts the kernels whose warpgroups take turns."""

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from expertmesh.kernels.blocks import ceil_div
from expertmesh.kernels.layout import Layout
from expertmesh.kernels.moe_mlp.fused.dhidden_turns import dhidden_turns_kernel
from expertmesh.kernels.moe_mlp.fused.plan import Turns
from expertmesh.kernels.moe_mlp.fused.turns import rows_turns_kernel

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
WARPS, REGISTERS, REGISTERS_OF_FOUR = 4, 168, 128
"""Of a warpgroup; per thread when three or four of them start, before they trade."""


def multiply_rows(
    rows_NI: Tensor, weight: Tensor, layout: Layout, turns: Turns, num_sms: int, *, transposed: bool
) -> Tensor:
    """As ``launch.multiply_rows``, of matrices without gaps."""
    parts, inner, outer = weight.shape[1:]
    if transposed:
        inner, outer = outer, inner
    cut = [turns.columns, turns.depth] if transposed else [turns.depth, turns.columns]
    out_NO = rows_NI.new_empty(rows_NI.shape[0], outer)
    rows_turns_kernel[(num_sms,)](
        descriptor(rows_NI, [turns.rows, turns.depth]),
        descriptor(weight.view(-1, weight.shape[-1]), cut),
        layout.tile_P3,
        layout.num_tiles_1,
        out_NO,
        parts * inner,
        outer,
        transposed,
        turns.stages,
        turns.group,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return out_NO


def hidden_gradient(
    dy: Tensor,
    down_EDF: Tensor,
    weight_RK: Tensor,
    pre_NH: Tensor,
    layout: Layout,
    activation: str,
    turns: Turns,
    num_sms: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``launch.hidden_gradient``, of rows by token if they are gathered, else grouped."""
    num_experts, dim, hidden = down_EDF.shape
    num_assignments = pre_NH.shape[0]
    dpre_NH = torch.empty_like(pre_NH)
    hidden_NF = pre_NH.new_empty(num_assignments, hidden)
    blocks = ceil_div(hidden, turns.columns)
    share_NB = pre_NH.new_empty(num_assignments, blocks, dtype=torch.float32)
    dhidden_turns_kernel[(num_sms,)](
        dy if turns.gather else descriptor(dy, [turns.rows, turns.depth]),
        descriptor(down_EDF.view(-1, hidden), [turns.depth, turns.columns]),
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
        dim,
        hidden,
        pre_NH.shape[1] // hidden,
        activation,
        weight_RK.shape[1] if turns.gather else 0,
        turns.rows,
        turns.stages,
        turns.group,
        num_warps=WARPS,
        maxnreg=REGISTERS_OF_FOUR if turns.gather else REGISTERS,
    )
    return dpre_NH, hidden_NF, share_NB


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """Of 16-bit numbers, as the copy engine swizzles them for the tensor cores."""
    return TensorDescriptor.from_tensor(matrix, block, _layout(*block, matrix.dtype))


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[dtype])
