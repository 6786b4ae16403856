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
    """Sum over the K choices of each row, in the order of the choices.

    Sentinels are masked, not multiplied by zero: their grouped rows may hold anything.

    Args:
        rows_ND: One row for each grouped position, ``(N, D)``.
        grouping: Where each choice's row lies.
        weight_RK: Multiplies each choice's row, ``(R, K)``; None sums unweighted.
        dtype: What is accumulated in.

    Returns:
        ``(R, D)`` in ``dtype``.
    """
    inverse_RK, invalid_RK1 = grouping.inverse_RK, ~grouping.valid_RK.unsqueeze(-1)
    chosen_ND = rows_ND.index_select(0, inverse_RK.reshape(-1))
    chosen_RKD = chosen_ND.view(*inverse_RK.shape, rows_ND.shape[1])
    chosen_RKD = chosen_RKD.masked_fill_(invalid_RK1, 0).to(dtype)
    if weight_RK is not None:
        weight_RK1 = weight_RK.to(dtype).unsqueeze(-1).masked_fill(invalid_RK1, 0)
        chosen_RKD = chosen_RKD.mul_(weight_RK1)
    return chosen_RKD.sum(dim=1)


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
