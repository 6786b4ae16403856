"""``block_sparse`` as a backend of the expert operation. Triton is imported when it runs."""

from typing import ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp.block_sparse.topology import BLOCK, stacked_columns
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec
from expertmesh.kernels.triton_support import triton_refusal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class BlockSparseMLP(MLPBackend):
    """MegaBlocks' formulation, to compare with and for experts of unequal width.

    Args:
        block: Rows and columns of a block, a power of two of at least 16.
    """

    name: ClassVar[str] = "block_sparse"
    summary: ClassVar[str] = "block-sparse products in Triton (MegaBlocks); only if asked for"

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block

    def refusal(self, problem: Problem) -> str | None:
        if problem.dropout:
            return "it drops no hidden units"
        if problem.dtype not in DTYPES:
            return f"it takes bfloat16, float16 and float32, not {problem.dtype}"
        if problem.compiling:
            return "torch.compile does not trace its products"
        return triton_refusal(problem.device)

    def suits(self, problem: Problem) -> bool:
        return False

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        from expertmesh.kernels.moe_mlp.block_sparse.mlp import block_sparse_mlp

        up, up_bias = operands.up, operands.up_bias
        num_experts, hidden = operands.num_experts, up.shape[-2]
        columns = stacked_columns(num_experts, hidden, self.block, up.device)
        if spec.num_parts == 1:
            up, up_bias = up.unsqueeze(1), None if up_bias is None else up_bias.unsqueeze(1)
        return block_sparse_mlp(
            operands.x_RD,
            operands.expert_RK,
            operands.weight_RK,
            up.transpose(0, 1),
            operands.down_EDF.mT,
            None if up_bias is None else up_bias.transpose(0, 1),
            operands.down_bias_ED,
            columns,
            spec,
        )
