"""Run experts that are arbitrary modules, one after another, each on its own rows."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.grouping import group_by_expert

RunExpert = Callable[[int, Tensor], Tensor]


def run_per_expert(
    run: RunExpert, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, num_experts: int
) -> tuple[Tensor, list[int]]:
    """The weighted sum of each row's experts, by autograd.

    The row counts are read on the host once. Gathers use each position once, so the gradient
    adds nothing in an order that could change.

    Args:
        run: Expert ``e`` on its rows: ``(n, D)`` to ``(n, D)``; called for experts with rows.
        x_RD: Rows, ``(R, D)``.
        expert_RK: Expert ids, ``(R, K)``; E means none.
        weight_RK: Combine weights, ``(R, K)``.
        num_experts: Number of experts E.

    Returns:
        ``(R, D)`` in x's dtype, and the experts that had no rows.
    """
    num_rows, k = expert_RK.shape
    grouping = group_by_expert(expert_RK, num_experts)
    counts = torch.diff(grouping.offsets_E, prepend=grouping.offsets_E.new_zeros(1)).tolist()
    x_ND = x_RD.unsqueeze(1).expand(-1, k, -1).flatten(0, 1)
    valid_ND = x_ND.index_select(0, grouping.order_N)[: sum(counts)]
    outputs = []
    for expert, rows in enumerate(valid_ND.split(counts)):
        if len(rows) > 0:
            outputs.append(_checked(expert, rows, run(expert, rows)))
    dtype = torch.promote_types(torch.float32, x_RD.dtype)
    dtype = torch.promote_types(dtype, weight_RK.dtype)
    outputs.append(x_RD.new_zeros(num_rows * k - sum(counts), x_RD.shape[1], dtype=dtype))
    out_ND = torch.cat([output.to(dtype) for output in outputs])
    out_ND = out_ND.index_select(0, grouping.inverse_RK.reshape(-1))
    out_RKD = out_ND.view(num_rows, k, x_RD.shape[1])
    weight_RK1 = weight_RK.masked_fill(~grouping.valid_RK, 0).unsqueeze(-1)
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    y_RD = (out_RKD * weight_RK1).sum(dim=1).to(x_RD.dtype)
    if len(idle) == num_experts:
        y_RD = with_zero_gradients(y_RD, [x_RD])  # x had no part in it
    return y_RD, idle


def _checked(expert: int, rows: Tensor, output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.shape != rows.shape:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"expert {expert} must return the shape it was given, {tuple(rows.shape)}, got {got}"
        )
    return output


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros(s, dtype=t, device=d) for s, t, d in ctx.like]
        wanted = ctx.needs_input_grad[1:]
        return (dy, *(z if w else None for z, w in zip(zeros, wanted, strict=True)))


def with_zero_gradients(y: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``y``, with a gradient of zero, not None, for parameters that had no part in it."""
    return _ZeroGradients.apply(y, *parameters)
