"""The expert computation over grouped products: whole buffers, no loop over experts.

One autograd function with the dataflow of ``loop.py``, which ``torch.compile`` can trace. It
saves x and the pre-activation. Rows of sentinels lie past the last group, hold anything, and are
masked where rows come back to their tokens.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.activations import hidden_from_parts, hidden_from_parts_vjp
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.dtypes import cast, without_autocast
from expertmesh.kernels.first_order import first_order
from expertmesh.kernels.grouped_gemm import GroupedGemm, TorchGroupedMM
from expertmesh.kernels.grouped_gemm.torch_grouped_mm import DTYPES
from expertmesh.kernels.grouping import Grouping, combine, group_by_expert
from expertmesh.kernels.moe_mlp.dropout import dropped, dropped_vjp
from expertmesh.kernels.moe_mlp.problem import (
    ALIGNMENT,
    MLPBackend,
    MLPOperands,
    MLPSpec,
    misaligned,
)
from expertmesh.kernels.triton_support import capability


class GroupedMLP(MLPBackend):
    """``torch.nn.functional.grouped_mm`` for every product."""

    name: ClassVar[str] = "grouped_mm"
    summary: ClassVar[str] = "torch's grouped_mm in one autograd function; CUDA bfloat16"

    def refusal(self, problem: Problem) -> str | None:
        if not hasattr(torch.nn.functional, "grouped_mm"):
            return "this torch has no torch.nn.functional.grouped_mm"
        if problem.device.type not in ("cpu", "cuda"):
            return f"grouped_mm has no kernel for {problem.device.type}"
        if problem.dtype not in DTYPES:
            return f"grouped_mm takes float32, float16 and bfloat16, not {problem.dtype}"
        if problem.compiling and problem.dtype != torch.bfloat16:
            return "torch.compile traces grouped_mm for bfloat16 only"
        return misaligned(problem) or _device_refusal(problem)

    def suits(self, problem: Problem) -> bool:
        return problem.device.type == "cuda" and problem.dtype == torch.bfloat16

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        return run_grouped(operands, spec, TorchGroupedMM())


def _device_refusal(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return None
    if capability(problem.device) < (8, 0):
        return "grouped_mm needs compute capability 8.0"
    if problem.capturing and problem.dtype != torch.bfloat16:
        return "grouped_mm reads the row counts on the host unless the dtype is bfloat16"
    return None


def run_grouped(operands: MLPOperands, spec: MLPSpec, gemm: GroupedGemm) -> Tensor:
    """The operation over any grouped product."""
    grouping = group_by_expert(operands.expert_RK, operands.num_experts)
    expert_N = operands.expert_RK.reshape(-1)[grouping.order_N]
    expert_N = expert_N.clamp(max=operands.num_experts - 1)
    draw_N = None if operands.draw_R is None else operands.draw_R[grouping.row_N]
    return _GroupedFunction.apply(*operands.differentiable, *grouping, expert_N, draw_N, spec, gemm)


class _GroupedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        up_bias_EH: Tensor | None,
        down_bias_ED: Tensor | None,
        order_N: Tensor,
        inverse_RK: Tensor,
        offsets_E: Tensor,
        valid_RK: Tensor,
        expert_N: Tensor,
        draw_N: Tensor | None,
        spec: MLPSpec,
        gemm: GroupedGemm,
    ) -> Tensor:
        grouping = Grouping(order_N, inverse_RK, offsets_E, valid_RK)
        x_ND = x_RD.index_select(0, grouping.row_N)
        # Each part by a product of its own: elementwise operations on parts of one buffer, whose
        # rows are not contiguous, take twice as long.
        parts = spec.num_parts
        pre_NF = [gemm.matmul(x_ND, up.mT, offsets_E) for up in up_EHD.chunk(parts, dim=1)]
        if up_bias_EH is not None:
            biases = up_bias_EH[expert_N].chunk(parts, dim=1)
            pre_NF = [pre + bias for pre, bias in zip(pre_NF, biases, strict=True)]
        hidden_NF = hidden_from_parts(spec.activation, pre_NF)
        hidden_NF = dropped(hidden_NF, _factor(spec, draw_N, expert_N, hidden_NF))
        out_ND = gemm.matmul(hidden_NF, down_EDF.mT, offsets_E)
        if down_bias_ED is not None:
            out_ND = out_ND + down_bias_ED[expert_N]
        ctx.save_for_backward(
            x_RD, weight_RK, up_EHD, down_EDF, down_bias_ED, *grouping, expert_N, draw_N, *pre_NF
        )
        ctx.spec, ctx.gemm = spec, gemm
        return cast(combine(out_ND, grouping, weight_RK, spec.sum_dtype), spec.out_dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy_RD.device.type):
            return (*_gradients(ctx, dy_RD), *[None] * 8)


def _gradients(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
    x_RD, weight_RK, up_EHD, down_EDF, down_bias_ED, *rest = ctx.saved_tensors
    fields, expert_N, draw_N, pre_NF = rest[:4], rest[4], rest[5], rest[6:]
    grouping, spec, gemm = Grouping(*fields), ctx.spec, ctx.gemm
    wants_x, wants_weight, wants_up, wants_down, wants_up_bias, wants_down_bias = (
        ctx.needs_input_grad[:6]
    )
    wants_pre = wants_x or wants_up or wants_up_bias
    offsets_E, weight_N1 = grouping.offsets_E, weight_RK.reshape(-1)[grouping.order_N].unsqueeze(1)
    dx = dweight = dup = ddown = dup_bias = ddown_bias = None

    dy_ND = dy_RD.to(x_RD.dtype).index_select(0, grouping.row_N)
    hidden = hidden_from_parts_vjp(spec.activation, pre_NF)
    factor_NF = _factor(spec, draw_N, expert_N, hidden.hidden)
    hidden_NF, pre_gradient = dropped_vjp(hidden, factor_NF)
    if wants_pre or wants_weight:
        dhidden_NF = gemm.matmul(dy_ND, down_EDF, offsets_E)
    if wants_weight:
        share_N = _dot_rows(dhidden_NF, hidden_NF, spec.sum_dtype)
        if down_bias_ED is not None:
            share_N = share_N + (dy_ND.to(spec.sum_dtype) * down_bias_ED[expert_N]).sum(-1)
        dweight = share_N[grouping.inverse_RK].masked_fill(~grouping.valid_RK, 0)
        dweight = cast(dweight, weight_RK.dtype)
    if wants_down_bias:
        ddown_bias = _sum_groups(gemm, dy_ND, weight_N1, offsets_E)
    if wants_pre:
        dpre_NH = pre_gradient(dhidden_NF.mul_(weight_N1))
    if wants_down:
        # Of a plain MLP they may be the pre-activations themselves.
        hidden_NF = hidden_NF if spec.num_parts > 1 else hidden_NF.clone()
        ddown = gemm.outer(dy_ND, hidden_NF.mul_(weight_N1), offsets_E)
    if wants_pre:
        if wants_x:
            dx_ND = gemm.matmul(dpre_NH, up_EHD, offsets_E)
            dx = cast(combine(dx_ND, grouping, None, spec.sum_dtype), x_RD.dtype)
        if wants_up:
            dup = gemm.outer(dpre_NH, x_RD.index_select(0, grouping.row_N), offsets_E)
        if wants_up_bias:
            dup_bias = _sum_groups(gemm, dpre_NH, torch.ones_like(weight_N1), offsets_E)
    return dx, dweight, dup, ddown, dup_bias, ddown_bias


def _factor(
    spec: MLPSpec, draw_N: Tensor | None, expert_N: Tensor, hidden_NF: Tensor
) -> Tensor | None:
    """What dropout multiplies hidden units by."""
    if spec.dropout is None or draw_N is None:
        return None
    return spec.dropout.factor(draw_N, expert_N, hidden_NF)


def _dot_rows(a_NI: Tensor, b_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """Dot products of rows, summed in ``dtype``.

    bfloat16 has float32's range: its products may be rounded before they are summed, which their
    factors were already. Those of float16 may vanish.
    """
    wide_NI = a_NI if a_NI.dtype == torch.bfloat16 else a_NI.to(dtype)
    return (wide_NI * b_NI).sum(-1, dtype=dtype)


def _sum_groups(gemm: GroupedGemm, rows_NO: Tensor, weight_N1: Tensor, offsets_E: Tensor) -> Tensor:
    """Sum the weighted rows of each group, by the same deterministic product."""
    weight_NI = weight_N1.to(rows_NO.dtype).repeat(1, ALIGNMENT // rows_NO.dtype.itemsize)
    return gemm.outer(rows_NO, weight_NI, offsets_E)[:, :, 0]
