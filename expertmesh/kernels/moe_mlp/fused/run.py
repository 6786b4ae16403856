"""Forward and backward over the fused kernels; the dataflow of SonicMoE (arXiv 2512.14080).

Kept between the two are x, the combine weights, the pre-activation and small int32 tables. The
hidden units are computed again from the pre-activation, and the experts' outputs are not kept;
gathered copies of x or of the output's gradient live for a product or two where that is faster.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from expertmesh.kernels.choice_sum import sum_choices
from expertmesh.kernels.layout import Layout, empty_layout, make_layout
from expertmesh.kernels.moe_mlp.fused import launch
from expertmesh.kernels.moe_mlp.fused.plan import Plan, Turns, plan_for

_known_plan = cache(plan_for)
"""Which a layer asks twice a step."""


def forward(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up_EPFD: Tensor,
    down_EDF: Tensor,
    up_bias: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    *,
    keep: bool,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Layout]:
    """The weighted sum of each row's experts.

    Args:
        x_RD: Rows.
        expert_RK: Ids, E for a sentinel.
        weight_RK: Combine weights.
        up_EPFD: P is 2 for gated experts, else 1. Rows of D elements, otherwise any strides.
        down_EDF: Down projection.
        up_bias: ``(E, P, F)``, or None.
        down_bias_ED: Or None.
        activation: A name of ``fused.activations``.
        out_dtype: Of the output.
        keep: Whether a backward pass may follow.
        plan: None for ``plan_for``'s.

    Returns:
        Output ``(R, D)``; pre-activation ``(N, P F)``, or with nothing in it if not kept; layout.
    """
    plan = plan or _plan(x_RD, expert_RK, up_EPFD)
    num_experts, parts, hidden, dim = up_EPFD.shape
    y_RD = x_RD.new_empty(x_RD.shape[0], dim, dtype=out_dtype)
    if expert_RK.numel() == 0:
        layout = empty_layout(expert_RK, 0, num_experts, plan.rows)
        return y_RD.zero_(), x_RD.new_empty((0, parts * hidden) if keep else (0,)), layout
    layout = make_layout(expert_RK, num_experts, plan.rows)
    choices = expert_RK.shape[1]
    hidden_NF, pre_NH = launch.up_project(
        x_RD, up_EPFD, up_bias, layout, choices, activation, plan.up, keep=keep
    )
    out_ND = launch.multiply_rows(
        hidden_NF, down_EDF.unsqueeze(1), layout, plan.down, transposed=True
    )
    sum_choices(
        out_ND,
        layout.inverse_N,
        y_RD,
        weight_RK=weight_RK,
        expert_RK=expert_RK,
        bias_ED=down_bias_ED,
    )
    return y_RD, pre_NH, layout


def backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    weight_RK: Tensor,
    up_EPFD: Tensor,
    down_EDF: Tensor,
    up_bias: Tensor | None,
    down_bias_ED: Tensor | None,
    pre_NH: Tensor,
    layout: Layout,
    activation: str,
    wanted: Sequence[bool],
    *,
    quack: bool = False,
    plan: Plan | None = None,
) -> list[Tensor]:
    """Gradients of x, combine weights, up, down and the biases; empty where not ``wanted``."""
    plan = plan or _plan(x_RD, layout.order_N, up_EPFD, quack=quack)
    operands = (x_RD, weight_RK, up_EPFD, down_EDF, up_bias, down_bias_ED)
    if layout.order_N.numel() == 0:
        return [
            torch.zeros_like(operand) if want and operand is not None else x_RD.new_empty(0)
            for operand, want in zip(operands, wanted, strict=True)
        ]
    wants_x, wants_weight, wants_up, wants_down, wants_up_bias, wants_down_bias = wanted
    num_experts, choices = down_EDF.shape[0], weight_RK.shape[1]
    dx = dweight = dup = ddown = dup_bias = ddown_bias = None
    copied = isinstance(plan.dhidden, Turns) and not plan.dhidden.gather
    dy_ND = launch.spread(dy_RD, layout) if copied else None
    dpre_NH, hidden_NF, share_NB = launch.hidden_gradient(
        dy_RD, down_EDF, weight_RK, pre_NH, layout, activation, plan.dhidden, dy_ND=dy_ND
    )
    if wants_weight:
        dweight = launch.sum_shares(share_NB, layout.inverse_N, torch.empty_like(weight_RK))
        if down_bias_ED is not None:
            dweight += _bias_share(dy_RD, down_bias_ED, layout, choices).to(dweight.dtype)
    if wants_down:
        ddown = launch.weight_gradient(
            hidden_NF, dy_RD, layout, choices, down_EDF, plan.ddown, flipped=True, gathered_NO=dy_ND
        )
    del hidden_NF, dy_ND
    if wants_x:
        dx_ND = launch.multiply_rows(dpre_NH, up_EPFD, layout, plan.dx, transposed=False)
        dx = sum_choices(dx_ND, layout.inverse_N, torch.empty_like(x_RD))
        del dx_ND
    if wants_up:
        dup = launch.weight_gradient(
            dpre_NH, x_RD, layout, choices, up_EPFD, plan.dup, flipped=False
        )
    if wants_up_bias and up_bias is not None:
        dup_bias = launch.sum_experts(dpre_NH, layout, num_experts).view_as(up_bias)
    if wants_down_bias:
        ddown_bias = launch.sum_experts(dy_RD, layout, num_experts, weight_RK=weight_RK)
    grads = (dx, dweight, dup, ddown, dup_bias, ddown_bias)
    return [x_RD.new_empty(0) if grad is None else grad for grad in grads]


def unwritten_layout(x_RD: Tensor, expert_RK: Tensor, up_EPFD: Tensor) -> Layout:
    """Tables of the shapes that ``forward`` returns."""
    plan = _plan(x_RD, expert_RK, up_EPFD)
    return empty_layout(expert_RK, expert_RK.numel(), len(up_EPFD), plan.rows)


def _bias_share(dy_RD: Tensor, bias_ED: Tensor, layout: Layout, choices: int) -> Tensor:
    """``<dy, b>`` of each choice, 0 for sentinels, ``(R, K)``."""
    inverse_RK = layout.inverse_N.view(-1, choices)
    expert_RK = torch.searchsorted(layout.offset_E1[1:], inverse_RK, right=True)
    share_RE = dy_RD.float() @ bias_ED.float().T
    share_RK = share_RE.gather(1, expert_RK.clamp_(max=len(bias_ED) - 1))
    return share_RK.masked_fill_(inverse_RK < 0, 0)


def _plan(x_RD: Tensor, assignments: Tensor, up_EPFD: Tensor, *, quack: bool = False) -> Plan:
    num_experts, parts, hidden, dim = up_EPFD.shape
    sizes = {
        "num_experts": num_experts,
        "num_assignments": assignments.numel(),
        "dim": dim,
        "hidden": hidden,
        "parts": parts,
    }
    traced = any(isinstance(size, torch.SymInt) for size in sizes.values())
    find = plan_for if traced else _known_plan  # a symbol cannot be looked up
    return find(x_RD.device, x_RD.dtype, **sizes, packed=up_EPFD.is_contiguous(), quack=quack)
