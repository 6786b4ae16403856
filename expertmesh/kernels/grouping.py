"""Bring the rows of one expert together, and add what comes back in a fixed order."""

from typing import NamedTuple

import torch
from torch import Tensor


class Grouping(NamedTuple):
    """Assignments sorted by expert, sentinels last; within an expert by row, then by choice.

    Attributes:
        order_N: Flat assignment ``row * K + choice`` at each grouped position, int64.
        inverse_RK: Grouped position of each assignment, int64.
        offsets_E: End of each expert's span of positions, int32. Positions from
            ``offsets_E[-1]`` on belong to sentinels.
        valid_RK: False where the choice is the sentinel.
    """

    order_N: Tensor
    inverse_RK: Tensor
    offsets_E: Tensor
    valid_RK: Tensor

    @property
    def row_N(self) -> Tensor:
        """The row of x that each grouped position reads."""
        return self.order_N // max(1, self.inverse_RK.shape[1])


def group_by_expert(expert_RK: Tensor, num_experts: int) -> Grouping:
    """Sort assignments by expert without leaving the device.

    Args:
        expert_RK: Expert ids ``(R, K)``; ``num_experts`` is the sentinel.
        num_experts: Number of experts E.

    Returns:
        The grouping; the same ids give the same grouping on every device.
    """
    expert_N = expert_RK.reshape(-1).to(torch.int32)
    sorted_N, order_N = torch.sort(expert_N, stable=True)
    position_N = torch.arange(len(expert_N), device=expert_N.device)
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, position_N)
    experts_E = torch.arange(num_experts, device=expert_N.device, dtype=torch.int32)
    offsets_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
    return Grouping(order_N, inverse_N.view_as(expert_RK), offsets_E, expert_RK < num_experts)


def combine(
    rows_ND: Tensor, grouping: Grouping, weight_RK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Sum over the K choices of each row, in a fixed order.

    Sentinels are masked, not multiplied by zero: their grouped rows may hold anything.

    Args:
        rows_ND: One row for each grouped position, ``(N, D)``. The row of a sentinel may be
            overwritten.
        grouping: Where each choice's row lies.
        weight_RK: Multiplies each choice's row, ``(R, K)``; None sums unweighted.
        dtype: What is accumulated in.

    Returns:
        ``(R, D)`` in ``dtype``.
    """
    if rows_ND.device.type == "cuda" and len(rows_ND) > 0 and not torch.compiler.is_compiling():
        return _combine_passes(rows_ND, grouping, weight_RK, dtype)
    inverse_RK, invalid_RK1 = grouping.inverse_RK, ~grouping.valid_RK.unsqueeze(-1)
    chosen_ND = rows_ND.index_select(0, inverse_RK.reshape(-1))
    chosen_RKD = chosen_ND.view(*inverse_RK.shape, rows_ND.shape[1])
    chosen_RKD = chosen_RKD.masked_fill_(invalid_RK1, 0).to(dtype)
    if weight_RK is not None:
        weight_RK1 = weight_RK.to(dtype).unsqueeze(-1).masked_fill(invalid_RK1, 0)
        chosen_RKD = chosen_RKD.mul_(weight_RK1)
    return chosen_RKD.sum(dim=1)


def _combine_passes(
    rows_ND: Tensor, grouping: Grouping, weight_RK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``combine`` in few passes over the rows, for a GPU that runs each operation by itself."""
    # Sentinels lie last. All of them read the last row, which is zeroed if it is one of theirs:
    # no pass over all rows to mask them.
    last = len(rows_ND) - 1
    rows_ND[last:].masked_fill_(grouping.offsets_E[-1] <= last, 0)
    inverse_RK = grouping.inverse_RK.masked_fill(~grouping.valid_RK, last)
    if weight_RK is None:
        chosen_ND = rows_ND.index_select(0, inverse_RK.reshape(-1))
        return chosen_ND.view(*inverse_RK.shape, rows_ND.shape[1]).sum(dim=1, dtype=dtype)
    weight_RK = weight_RK.to(dtype).masked_fill(~grouping.valid_RK, 0)
    aligned = weight_RK.shape[1] % 8 == 0  # products of other widths are slower than additions
    if rows_ND.dtype == torch.bfloat16 and dtype == torch.float32 and aligned:
        return _weighted_sum(rows_ND, inverse_RK, weight_RK)
    total_RD = rows_ND.new_zeros(len(weight_RK), rows_ND.shape[1], dtype=dtype)
    for inverse_R, weight_R1 in zip(inverse_RK.unbind(1), weight_RK.split(1, dim=1), strict=True):
        total_RD.addcmul_(rows_ND.index_select(0, inverse_R), weight_R1)
    return total_RD


def _weighted_sum(rows_ND: Tensor, inverse_RK: Tensor, weight_RK: Tensor) -> Tensor:
    """Products of bfloat16 numbers summed in float32, with no float32 copy of the rows.

    The sum of two bfloat16 numbers holds a weight to 2^-17 of its size.
    """
    chosen_ND = rows_ND.index_select(0, inverse_RK.reshape(-1))
    chosen_RKD = chosen_ND.view(*inverse_RK.shape, rows_ND.shape[1])
    high_RK = weight_RK.to(rows_ND.dtype)
    low_RK = (weight_RK - high_RK).to(rows_ND.dtype)
    weight_R2K = torch.stack([high_RK, low_RK], dim=1)
    return torch.bmm(weight_R2K, chosen_RKD, out_dtype=weight_RK.dtype).sum(dim=1)


def combine_zeroed(
    rows_ND: Tensor, grouping: Grouping, weight_RK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``combine`` where the rows of sentinels hold zeros: they need no mask.

    On the CPU it reads each row once and writes no buffer of N rows, which costs several times as
    much as the sum itself.

    Args:
        rows_ND: One row for each grouped position, ``(N, D)``; zeros from ``offsets_E[-1]`` on.
        grouping: Where each choice's row lies.
        weight_RK: Multiplies each choice's row, ``(R, K)``; None sums unweighted.
        dtype: What is accumulated in.

    Returns:
        ``(R, D)`` in ``dtype``.
    """
    if rows_ND.device.type != "cpu" or rows_ND.numel() == 0:
        return combine(rows_ND, grouping, weight_RK, dtype)
    if weight_RK is not None:
        weight_RK = torch.where(grouping.valid_RK, weight_RK.to(dtype), 0)
    return torch.nn.functional.embedding_bag(
        grouping.inverse_RK, rows_ND.to(dtype), mode="sum", per_sample_weights=weight_RK
    )
