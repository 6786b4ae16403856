"""The experts as a block-sparse matrix between two dense ones, with one gradient.

``hidden = act(S(x up^T))``, ``y = hidden down``, where S keeps the blocks of each row's expert: a
sampled product (SDD), the activation on its values, and a sparse-dense product (DSD). In the
backward pass a sampled product gives the hidden units' gradient, sparse-dense ones the rows', and
ones with the transposed matrix the weights' (MegaBlocks, arXiv 2211.15841, section 5). Only x and
the pre-activations are saved; rows are gathered again and hidden units computed again.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.activations import hidden_from_parts, hidden_from_parts_vjp
from expertmesh.kernels.dtypes import cast, without_autocast
from expertmesh.kernels.first_order import first_order
from expertmesh.kernels.grouping import combine
from expertmesh.kernels.moe_mlp.block_sparse.products import (
    dds,
    dsd,
    dsd_transposed,
    row_dots,
    sdd,
)
from expertmesh.kernels.moe_mlp.block_sparse.rows import PaddedRows, pad_rows
from expertmesh.kernels.moe_mlp.block_sparse.topology import Columns, Topology, make_topology
from expertmesh.kernels.moe_mlp.problem import MLPSpec


def block_sparse_mlp(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up_MSUD: Tensor,
    down_SUD: Tensor,
    up_bias_MSU: Tensor | None,
    down_bias_ED: Tensor | None,
    columns: Columns,
    spec: MLPSpec,
) -> Tensor:
    """The weighted sum of each row's experts.

    Args:
        x_RD: Rows, ``(R, D)``.
        expert_RK: Expert ids, E for a sentinel.
        weight_RK: Combine weights.
        up_MSUD: First projection of the M parts, any strides.
        down_SUD: Second projection, a row for each hidden unit, any strides.
        up_bias_MSU: Bias of the first projection, or None.
        down_bias_ED: Bias of the second projection, or None.
        columns: Which units of the slabs each expert has.
        spec: What is not a tensor.

    Returns:
        ``(R, D)`` in ``spec.out_dtype``, differentiable once.
    """
    rows = pad_rows(expert_RK, len(columns.start_E1) - 1, columns.block)
    topology = make_topology(rows, columns)
    operands = (x_RD, weight_RK, up_MSUD, down_SUD, up_bias_MSU, down_bias_ED)
    return _BlockSparseFunction.apply(*operands, rows, topology, spec)


class _BlockSparseFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        up_MSUD: Tensor,
        down_SUD: Tensor,
        up_bias_MSU: Tensor | None,
        down_bias_ED: Tensor | None,
        rows: PaddedRows,
        topology: Topology,
        spec: MLPSpec,
    ) -> Tensor:
        pre_MZBB = sdd(x_RD.index_select(0, rows.row_P), up_MSUD, topology)
        if up_bias_MSU is not None:
            pre_MZBB += _on_blocks(up_bias_MSU, topology)
        hidden_ZBB = hidden_from_parts(spec.activation, pre_MZBB.unbind(0))
        out_PD = dsd(hidden_ZBB.unsqueeze(0), down_SUD.unsqueeze(0), topology)
        if down_bias_ED is not None:
            out_PD += down_bias_ED[_by_row(rows.expert_I, topology)]
        ctx.save_for_backward(x_RD, weight_RK, up_MSUD, down_SUD, down_bias_ED, pre_MZBB)
        ctx.rows, ctx.topology, ctx.spec = rows, topology, spec
        return cast(combine(out_PD, rows.grouping, weight_RK, spec.sum_dtype), spec.out_dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy_RD.device.type):
            return (*_gradients(ctx, dy_RD), None, None, None)


def _gradients(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, weight_RK, up_MSUD, down_SUD, down_bias_ED, pre_MZBB = ctx.saved_tensors
    rows, topology, spec = ctx.rows, ctx.topology, ctx.spec
    wants_x, wants_weight, wants_up, wants_down, wants_up_bias, wants_down_bias = (
        ctx.needs_input_grad[:6]
    )
    wants_pre = wants_x or wants_up or wants_up_bias
    dx = dweight = dup = ddown = dup_bias = ddown_bias = None

    dy_PD = dy_RD.to(x_RD.dtype).index_select(0, rows.row_P)
    hidden_ZBB, pre_gradient = hidden_from_parts_vjp(spec.activation, pre_MZBB.unbind(0))
    if wants_pre or wants_weight:
        (dhidden_ZBB,) = sdd(dy_PD, down_SUD.unsqueeze(0), topology)
    if wants_weight:
        share_P = row_dots(dhidden_ZBB, hidden_ZBB, topology).to(spec.sum_dtype)
        if down_bias_ED is not None:
            bias_PD = down_bias_ED[_by_row(rows.expert_I, topology)]
            share_P += (dy_PD.to(spec.sum_dtype) * bias_PD).sum(-1)
        dweight = share_P[rows.grouping.inverse_RK].masked_fill(~rows.grouping.valid_RK, 0)
        dweight = cast(dweight, weight_RK.dtype)
    weight_P = weight_RK.reshape(-1)[rows.order_P]
    dy_PD.mul_(weight_P.unsqueeze(1))
    if wants_down:
        ddown = torch.empty_like(down_SUD)
        dds(dy_PD.mT, hidden_ZBB.unsqueeze(0), ddown.mT.unsqueeze(0), topology)
    if wants_down_bias:
        ddown_bias = _sum_by_expert(dy_PD, rows, topology, len(down_bias_ED), spec.sum_dtype)
        ddown_bias = ddown_bias.to(down_bias_ED.dtype)
    if wants_pre:
        dhidden_ZBB *= weight_P.view(-1, topology.block, 1)[topology.row_Z]
        dpre_ZBMB = pre_gradient(dhidden_ZBB).unflatten(-1, (len(up_MSUD), topology.block))
        dpre_MZBB = dpre_ZBMB.permute(2, 0, 1, 3)
        if wants_x:
            dx_PD = dsd(dpre_MZBB, up_MSUD, topology)
            dx = cast(combine(dx_PD, rows.grouping, None, spec.sum_dtype), x_RD.dtype)
        if wants_up:
            x_PD = x_RD.index_select(0, rows.row_P)
            dup = dsd_transposed(dpre_MZBB, x_PD, torch.empty_like(up_MSUD), topology)
        if wants_up_bias:
            one_P1 = x_RD.new_ones(len(rows.row_P), 1)
            dup_bias = x_RD.new_empty(*up_MSUD.shape[:3], 1)
            dup_bias = dsd_transposed(dpre_MZBB, one_P1, dup_bias, topology).squeeze(-1)
    return dx, dweight, dup, ddown, dup_bias, ddown_bias


def _on_blocks(bias_MSU: Tensor, topology: Topology) -> Tensor:
    """What each block's columns add, ``(M, Z, 1, B)``."""
    columns = topology.columns
    place_B = torch.arange(topology.block, device=bias_MSU.device)
    unit_CB = columns.first_C.unsqueeze(1) + torch.minimum(
        place_B, columns.width_C.unsqueeze(1) - 1
    )
    bias_MCB = bias_MSU[:, columns.slab_C.long().unsqueeze(1), unit_CB.long()]
    return bias_MCB[:, topology.column_Z.long()].unsqueeze(2)


def _by_row(expert_I: Tensor, topology: Topology) -> Tensor:
    """Each position's expert, ``(P,)``."""
    return expert_I.unsqueeze(1).expand(-1, topology.block).reshape(-1)


def _sum_by_expert(
    rows_PD: Tensor, rows: PaddedRows, topology: Topology, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """Sums of experts' real rows in a fixed order, ``(E, D)``: by block, then by a product."""
    place_B = torch.arange(topology.block, device=rows_PD.device)
    padding_IB1 = (place_B >= topology.count_I.unsqueeze(1)).unsqueeze(2)
    rows_IBD = rows_PD.view(*padding_IB1.shape[:2], rows_PD.shape[1])
    sum_ID = rows_IBD.masked_fill(padding_IB1, 0).sum(1, dtype=dtype)
    expert_E1 = torch.arange(num_experts, device=rows_PD.device).unsqueeze(1)
    return (rows.expert_I == expert_E1).to(dtype) @ sum_ID
