"""For few rows: fetch the matrices of each assignment and multiply in one batch.

Each assignment copies its expert's weights, so this is for decoding, not for training. Shapes do
not depend on the data and nothing is read on the host: it can be recorded into a CUDA graph.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.activations import hidden_units
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec

# The most assignments for which ``auto`` copies weights: on an H200 at D=2048, F=1024, K=8, copying
# was faster than grouped_mm in bfloat16 up to 32 and slower at 64.
_MOST_ASSIGNMENTS = 32
_MOST_GIB = 32  # of copied weights; with gradient they are kept until backward


class GatherMLP(MLPBackend):
    """Batched products over gathered weights; the gradient is autograd's."""

    name: ClassVar[str] = "gather"
    summary: ClassVar[str] = "gathers each assignment's weights; for few rows, CUDA graphs"

    def refusal(self, problem: Problem) -> str | None:
        if problem.dropout:
            return "it drops no hidden units"
        copied = problem.num_assignments * (problem.num_parts + 1) * problem.dim * problem.hidden
        gib = copied * problem.dtype.itemsize / 2**30
        if gib > _MOST_GIB:
            return (
                f"it copies the matrices of each of {problem.num_assignments} choices, {gib:.0f} "
                f"GiB, and takes at most {_MOST_GIB}"
            )
        return None

    def suits(self, problem: Problem) -> bool:
        """On CUDA without gradient. A CPU has no launches to save, only the copy to pay for."""
        # Beyond E choices some expert's weights would be read twice.
        few = problem.num_assignments <= min(_MOST_ASSIGNMENTS, problem.num_experts)
        return few and problem.device.type == "cuda" and not problem.needs_grad

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        valid_RK1 = (operands.expert_RK < operands.num_experts).unsqueeze(-1)
        expert_N = operands.expert_RK.clamp(max=operands.num_experts - 1).reshape(-1)
        x_RKD = torch.where(valid_RK1, operands.x_RD.unsqueeze(1), 0)
        pre_NH = _rows_times(x_RKD.flatten(0, 1), operands.up_EHD, operands.up_bias_EH, expert_N)
        hidden_NF = hidden_units(spec.activation, pre_NH, spec.num_parts)
        out_ND = _rows_times(hidden_NF, operands.down_EDF, operands.down_bias_ED, expert_N)
        out_RKD = torch.where(valid_RK1, out_ND.view_as(x_RKD), 0).to(spec.sum_dtype)
        weight_RK1 = torch.where(valid_RK1, operands.weight_RK.unsqueeze(-1), 0)
        return (out_RKD * weight_RK1).sum(dim=1).to(spec.out_dtype)


def _rows_times(
    x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, expert_N: Tensor
) -> Tensor:
    y_NO = torch.bmm(_Pick.apply(weight_EOI, expert_N), x_NI.unsqueeze(-1)).squeeze(-1)
    return y_NO if bias_EO is None else y_NO + _Pick.apply(bias_EO, expert_N)


class _Pick(torch.autograd.Function):
    """``values[index]``, whose gradient is a matrix product: indexing's adds in any order."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.num_values = values.shape[0]
        return values[index_N]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index_N,) = ctx.saved_tensors
        values_E1 = torch.arange(ctx.num_values, device=index_N.device).unsqueeze(1)
        picked_EN = (values_E1 == index_N).to(grad.dtype)
        return (picked_EN @ grad.flatten(1)).view(-1, *grad.shape[1:]), None
