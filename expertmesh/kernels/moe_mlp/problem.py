"""The operands of the operation, and what a backend of it is."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.kernels.activations import Activation
from expertmesh.kernels.backends import Backend, Problem
from expertmesh.kernels.moe_mlp.dropout import HiddenDropout

ALIGNMENT = 16
"""Bytes; rows that a copy engine or ``grouped_mm`` reads start at multiples of it."""


def misaligned(problem: Problem) -> str | None:
    """Why rows of matrices would not start at multiples of ``ALIGNMENT``; None if they do."""
    for name, width in (("dim", problem.dim), ("hidden", problem.hidden)):
        if width * problem.dtype.itemsize % ALIGNMENT != 0:
            multiple = ALIGNMENT // problem.dtype.itemsize
            return f"{name} must be a multiple of {multiple} for {problem.dtype}, got {width}"
    return None


@dataclass(frozen=True)
class MLPSpec:
    """What is not a tensor.

    Attributes:
        activation: Elementwise function.
        num_parts: P, how many projections are multiplied into the hidden units: 1, 2 if gated, 3 if
            doubly gated.
        out_dtype: The output's dtype.
        sum_dtype: What the sum over choices and the weights' gradient accumulate in.
        dropout: Of hidden units, or None.
    """

    activation: Activation
    num_parts: int
    out_dtype: torch.dtype
    sum_dtype: torch.dtype
    dropout: HiddenDropout | None = None


@dataclass(frozen=True)
class MLPOperands:
    """Tensors in the dtype of the matrix products; H is P F, the parts one after the other.

    Attributes:
        x_RD: Rows.
        expert_RK: Expert ids, E for a sentinel.
        weight_RK: Combine weights, float32 or wider.
        up: First projection, ``(E, F, D)``, or ``(E, P, F, D)`` of any strides.
        down_EDF: Second projection.
        up_bias: Bias of the first projection, ``up``'s shape without D, or None.
        down_bias_ED: Bias of the second projection, or None.
        draw_R: int64 ``(R,)``, the rows' random numbers, where there is dropout.
    """

    x_RD: Tensor
    expert_RK: Tensor
    weight_RK: Tensor
    up: Tensor
    down_EDF: Tensor
    up_bias: Tensor | None
    down_bias_ED: Tensor | None
    draw_R: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def up_EHD(self) -> Tensor:
        """The first projection with its parts flattened; a copy where strides forbid a view."""
        return self.up.flatten(1, -2)

    @property
    def up_bias_EH(self) -> Tensor | None:
        """The first projection's bias, flattened."""
        return None if self.up_bias is None else self.up_bias.flatten(1)

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        given = (self.x_RD, self.weight_RK, self.up, self.down_EDF, self.up_bias, self.down_bias_ED)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The operands that may have a gradient, parts flattened, which may copy ``up``."""
        biases = (self.up_bias_EH, self.down_bias_ED)
        return (self.x_RD, self.weight_RK, self.up_EHD, self.down_EDF, *biases)


class MLPBackend(Backend):
    """A backend of ``moe_mlp``."""

    @abstractmethod
    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        """The output ``(R, D)`` in ``spec.out_dtype``, differentiable."""
