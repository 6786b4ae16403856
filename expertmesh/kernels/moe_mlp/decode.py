"""For decoding: Triton kernels that read the weights of the chosen experts once and no more.

A token or a few: one launch per projection, programs of one assignment each, nothing sorted. More
rows: they are grouped by expert and the weights stand on the left of the matrix products. Shapes
do not depend on the data and nothing is read on the host, so it can be recorded into a CUDA graph.
Sums run in a fixed order.
"""

from typing import ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.activations import activation_name
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec
from expertmesh.kernels.triton_support import on_its_device, triton_refusal

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

MOST_ASSIGNMENTS = 2048
"""More than this is not decoding; the grouping compares every pair of assignments."""


_MOST_PROGRAMS = 65535
"""Along a launch's second axis, where outputs and experts lie."""


def _one_by_one(num_assignments: int, num_experts: int) -> bool:
    """Whether each assignment gets programs of its own: then few of them share an expert."""
    return num_assignments <= max(1, min(64, num_experts // 2))


class DecodeMLP(MLPBackend):
    """Bandwidth-bound kernels for few rows, without gradient."""

    name: ClassVar[str] = "decode"
    summary: ClassVar[str] = "Triton, reads chosen experts' weights once; few rows, no gradient"

    def refusal(self, problem: Problem) -> str | None:
        if problem.needs_grad:
            return "it has no gradient"
        if problem.dtype not in _DTYPES:
            return f"it takes bfloat16, float16 and float32, not {problem.dtype}"
        if problem.num_assignments > MOST_ASSIGNMENTS:
            return f"it takes at most {MOST_ASSIGNMENTS} assignments, not {problem.num_assignments}"
        widest = max(problem.dim, problem.hidden, problem.num_experts)
        if widest > _MOST_PROGRAMS:
            return f"dim, hidden and num_experts must be at most {_MOST_PROGRAMS}, got {widest}"
        if problem.activation is None:
            return "it knows plain activations by name, neither clamped_swiglu nor callables"
        if problem.dropout:
            return "it drops no hidden units"
        return triton_refusal(problem.device)

    def suits(self, problem: Problem) -> bool:
        """On CUDA up to 16 rows an expert: beyond, on an H200, larger tiles are as fast."""
        few = problem.num_assignments <= 16 * problem.num_experts
        return few and problem.device.type == "cuda" and problem.dtype != torch.float32

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        if operands.expert_RK.numel() == 0:
            return operands.x_RD.new_zeros(operands.x_RD.shape, dtype=spec.out_dtype)
        expert_RK = operands.expert_RK.to(torch.int64).contiguous()
        up, bias, down_bias = operands.up, operands.up_bias, operands.down_bias_ED
        hidden_NF, order_N, offset_E1 = torch.ops.expertmesh.decode_up(
            operands.x_RD.contiguous(),
            expert_RK,
            up if up.stride(-1) == 1 else up.contiguous(),
            None if bias is None else bias.contiguous(),
            activation_name(spec.activation),
        )
        y_RD: Tensor = torch.ops.expertmesh.decode_down(
            hidden_NF,
            expert_RK,
            operands.weight_RK.contiguous(),
            order_N,
            offset_E1,
            operands.down_EDF.contiguous(),
            None if down_bias is None else down_bias.contiguous(),
            spec.out_dtype,
        )
        return y_RD


# ``custom_op`` would import the compiler at the first call.
torch.library.define(
    "expertmesh::decode_up",
    "(Tensor x, Tensor expert, Tensor up, Tensor? bias, str activation)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "expertmesh::decode_down",
    "(Tensor hidden, Tensor expert, Tensor weight, Tensor order, Tensor offset, Tensor down,"
    " Tensor? bias, ScalarType dtype) -> Tensor",
)


@torch.library.register_fake("expertmesh::decode_up")
def _empty_hidden(
    x_RD: Tensor,
    expert_RK: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    N, E = expert_RK.numel(), len(up)
    tables = (0, 0) if _one_by_one(N, E) else (N, E + 1)
    order_N, offset_E1 = (x_RD.new_empty(length, dtype=torch.int32) for length in tables)
    return x_RD.new_empty(N, up.shape[-2]), order_N, offset_E1


@torch.library.impl("expertmesh::decode_up", "CompositeExplicitAutograd")
@on_its_device
def _up(
    x_RD: Tensor,
    expert_RK: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from expertmesh.kernels.moe_mlp import decode_launch as launch

    given = (x_RD, expert_RK, up, bias, activation)
    hidden_NF, order_N, offset_E1 = _empty_hidden(*given)
    if len(order_N) == 0:
        launch.up_rows(*given, hidden_NF)
    else:
        launch.group(expert_RK, order_N, offset_E1)
        launch.up_experts(*given, order_N, offset_E1, hidden_NF)
    return hidden_NF, order_N, offset_E1


@torch.library.register_fake("expertmesh::decode_down")
def _empty_output(
    hidden_NF: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    order_N: Tensor,
    offset_E1: Tensor,
    down_EDF: Tensor,
    bias_ED: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return hidden_NF.new_empty(len(expert_RK), down_EDF.shape[1], dtype=dtype)


@torch.library.impl("expertmesh::decode_down", "CompositeExplicitAutograd")
@on_its_device
def _down(
    hidden_NF: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    order_N: Tensor,
    offset_E1: Tensor,
    down_EDF: Tensor,
    bias_ED: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from expertmesh.kernels.moe_mlp import decode_launch as launch

    given = (hidden_NF, expert_RK, weight_RK, order_N, offset_E1, down_EDF, bias_ED)
    y_RD = _empty_output(*given, dtype)
    if len(order_N) == 0:
        launch.down_rows(*given, y_RD)
    else:
        launch.down_experts(*given, y_RD)
    return y_RD
