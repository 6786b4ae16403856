"""Rows grouped by expert, each expert's padded to whole blocks, without asking the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.kernels.grouping import Grouping, group_by_expert


class PaddedRows(NamedTuple):
    """P positions in I blocks of rows; what pads a block repeats rows that belong elsewhere.

    Attributes:
        order_P: Flat assignment ``row * K + choice`` at each position, int64.
        row_P: Row of x at each position, int64.
        expert_I: Expert of each block of rows, int64; any for a block in use by none.
        count_I: Rows of each block that are real, int32; 0 for a block in use by none, which the
            last one always is.
        grouping: The same as a ``Grouping`` over positions, for ``combine``.
    """

    order_P: Tensor
    row_P: Tensor
    expert_I: Tensor
    count_I: Tensor
    grouping: Grouping


def most_row_blocks(num_assignments: int, num_experts: int, block: int) -> int:
    """A bound that the host knows, and that some block is always left of, unless it is 0."""
    return -(-num_assignments // block) + min(num_experts, num_assignments)


def pad_rows(expert_RK: Tensor, num_experts: int, block: int) -> PaddedRows:
    """Lay assignments out by expert, each expert from a multiple of ``block`` on.

    Args:
        expert_RK: Expert ids ``(R, K)``; ``num_experts`` is the sentinel.
        num_experts: Number of experts E.
        block: Rows of a block.
    """
    grouping = group_by_expert(expert_RK, num_experts)
    num_assignments, device = expert_RK.numel(), expert_RK.device
    stop_E = grouping.offsets_E.long()
    count_E = torch.diff(stop_E, prepend=stop_E.new_zeros(1))
    blocks_E = (count_E + block - 1) // block
    block_stop_E = blocks_E.cumsum(0)
    first_E = block_stop_E - blocks_E

    index_I = torch.arange(most_row_blocks(num_assignments, num_experts, block), device=device)
    expert_I = torch.searchsorted(block_stop_E, index_I, right=True).clamp_(max=num_experts - 1)
    within_I = (index_I - first_E[expert_I]) * block
    count_I = (count_E[expert_I] - within_I).clamp_(0, block).int()
    start_I = (stop_E - count_E)[expert_I] + within_I
    position_IB = start_I.unsqueeze(1) + torch.arange(block, device=device)
    order_P = grouping.order_N[position_IB.clamp_(max=num_assignments - 1).reshape(-1)]

    shift_E = first_E * block - (stop_E - count_E)
    shift_RK = shift_E[expert_RK.clamp(max=num_experts - 1).long()]
    inverse_RK = torch.where(grouping.valid_RK, grouping.inverse_RK + shift_RK, len(order_P) - 1)
    offsets_E = (block_stop_E * block).int()
    padded = Grouping(order_P, inverse_RK, offsets_E, grouping.valid_RK)
    return PaddedRows(order_P, padded.row_N, expert_I, count_I, padded)
