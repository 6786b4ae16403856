"""The definition: y_r = sum over k of weight_rk * expert(x_r), expert by expert, plainly."""

from typing import ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.activations import hidden_units
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec


class ReferenceMLP(MLPBackend):
    """Autograd through plain indexing. Every other backend is tested against it in float64."""

    name: ClassVar[str] = "reference"
    summary: ClassVar[str] = "the definition, a plain loop over choices and experts"

    def refusal(self, problem: Problem) -> str | None:
        if problem.compiling:
            return "its row counts depend on the data, so torch.compile cannot trace it"
        return "its row counts depend on the data" if problem.capturing else None

    def suits(self, problem: Problem) -> bool:
        return False

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        x_RD, expert_RK, weight_RK = operands.x_RD, operands.expert_RK, operands.weight_RK
        y_RD = torch.zeros(x_RD.shape, dtype=spec.sum_dtype, device=x_RD.device)
        for k in range(expert_RK.shape[1]):
            for e in range(operands.num_experts):
                rows = (expert_RK[:, k] == e).nonzero().squeeze(1)
                out = _expert(operands, spec, rows, e)
                weighted = out.to(spec.sum_dtype) * weight_RK[rows, k].unsqueeze(1)
                y_RD = y_RD.index_add(0, rows, weighted)
        return y_RD.to(spec.out_dtype)


def _expert(operands: MLPOperands, spec: MLPSpec, rows: Tensor, e: int) -> Tensor:
    pre_NH = operands.x_RD[rows] @ operands.up_EHD[e].T
    if operands.up_bias_EH is not None:
        pre_NH = pre_NH + operands.up_bias_EH[e]
    hidden_NF = hidden_units(spec.activation, pre_NH, spec.num_parts)
    if spec.dropout is not None and operands.draw_R is not None:
        hidden_NF = hidden_NF * spec.dropout.factor(operands.draw_R[rows], e, hidden_NF)
    out_ND = hidden_NF @ operands.down_EDF[e].T
    if operands.down_bias_ED is not None:
        out_ND = out_ND + operands.down_bias_ED[e]
    return out_ND
