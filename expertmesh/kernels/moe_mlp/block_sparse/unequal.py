"""Experts of unequal width as one operation: their hidden units lie one behind the other.

Stacked operations need one width for all; a block-sparse matrix does not mind. Two backends:
``block_sparse`` where Triton runs, and ``reference``, the definition, everywhere.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.activations import (
    Activation,
    check_parts,
    hidden_from_parts,
    known_activation,
    resolve_activation,
)
from expertmesh.kernels.backends import Backend, Problem, choose
from expertmesh.kernels.dtypes import autocast_dtype, without_autocast
from expertmesh.kernels.moe_mlp.block_sparse.backend import BlockSparseMLP
from expertmesh.kernels.moe_mlp.block_sparse.topology import BLOCK, joined_columns
from expertmesh.kernels.moe_mlp.problem import MLPSpec


@dataclass(frozen=True)
class UnequalOperands:
    """Tensors in the dtype of the matrix products; H is the sum of the experts' widths.

    Attributes:
        x_RD: Rows.
        expert_RK: Expert ids, E for a sentinel.
        weight_RK: Combine weights.
        up_MHD: First projection, M parts.
        down_HD: Second projection, a row for each hidden unit.
        up_bias_MH: Bias of the first projection, or None.
        down_bias_ED: Bias of the second projection, or None.
        widths: Hidden units of each expert.
    """

    x_RD: Tensor
    expert_RK: Tensor
    weight_RK: Tensor
    up_MHD: Tensor
    down_HD: Tensor
    up_bias_MH: Tensor | None
    down_bias_ED: Tensor | None
    widths: tuple[int, ...]


class UnequalBackend(Backend):
    """A backend of ``unequal_mlp``."""

    @abstractmethod
    def run(self, operands: UnequalOperands, spec: MLPSpec) -> Tensor:
        """The output ``(R, D)`` in ``spec.out_dtype``, differentiable."""


class BlockSparseUnequal(UnequalBackend):
    """One product for all experts, whatever their widths; reads one number on the host.

    Args:
        block: Rows and columns of a block, a power of two of at least 16.
    """

    name: ClassVar[str] = "block_sparse"
    summary: ClassVar[str] = "block-sparse products in Triton over experts of any width"

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block

    def refusal(self, problem: Problem) -> str | None:
        if problem.capturing:
            return "how many blocks there are depends on the data"
        return BlockSparseMLP(self.block).refusal(problem)

    def suits(self, problem: Problem) -> bool:
        return problem.device.type == "cuda"

    def run(self, operands: UnequalOperands, spec: MLPSpec) -> Tensor:
        from expertmesh.kernels.moe_mlp.block_sparse.mlp import block_sparse_mlp

        columns = joined_columns(operands.widths, self.block, operands.x_RD.device)
        bias_MH = operands.up_bias_MH
        return block_sparse_mlp(
            operands.x_RD,
            operands.expert_RK,
            operands.weight_RK,
            operands.up_MHD.unsqueeze(1),
            operands.down_HD.unsqueeze(0),
            None if bias_MH is None else bias_MH.unsqueeze(1),
            operands.down_bias_ED,
            columns,
            spec,
        )


class UnequalReference(UnequalBackend):
    """The definition: autograd through a loop over experts and plain indexing."""

    name: ClassVar[str] = "reference"
    summary: ClassVar[str] = "the definition, expert by expert; any device and dtype"

    def refusal(self, problem: Problem) -> str | None:
        return "its row counts depend on the data" if problem.capturing else None

    def suits(self, problem: Problem) -> bool:
        return True

    def run(self, operands: UnequalOperands, spec: MLPSpec) -> Tensor:
        x_RD, expert_RK = operands.x_RD, operands.expert_RK
        y_RD = torch.zeros(x_RD.shape, dtype=spec.sum_dtype, device=x_RD.device)
        before = 0
        for expert, width in enumerate(operands.widths):
            units = slice(before, before + width)
            before += width
            row_N, choice_N = (expert_RK == expert).nonzero(as_tuple=True)
            pre_MNF = x_RD[row_N] @ operands.up_MHD[:, units].mT
            if operands.up_bias_MH is not None:
                pre_MNF = pre_MNF + operands.up_bias_MH[:, None, units]
            out_ND = hidden_from_parts(spec.activation, pre_MNF.unbind(0)) @ operands.down_HD[units]
            if operands.down_bias_ED is not None:
                out_ND = out_ND + operands.down_bias_ED[expert]
            weight_N1 = operands.weight_RK[row_N, choice_N].unsqueeze(1)
            y_RD = y_RD.index_put((row_N,), out_ND.to(spec.sum_dtype) * weight_N1, accumulate=True)
        return y_RD.to(spec.out_dtype)


UNEQUAL_BACKENDS: tuple[UnequalBackend, ...] = (BlockSparseUnequal(), UnequalReference())
"""Most specialised first: ``auto`` takes the first that can run the problem and suits it."""


def unequal_mlp(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up_MHD: Tensor,
    down_HD: Tensor,
    *,
    widths: Sequence[int],
    up_bias_MH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    activation: str | Activation = "silu",
    backend: str = "auto",
) -> Tensor:
    """``moe_mlp`` for experts of unequal width, as block-sparse products allow (MegaBlocks).

    Expert e has the units from ``sum(widths[:e])`` on, ``widths[e]`` of them. Sentinels, the
    sum over choices and autocast are as in ``moe_mlp``.

    Args:
        x_RD: Rows, ``(R, D)``.
        expert_RK: Expert ids ``(R, K)``; E contributes nothing.
        weight_RK: Combine weights, ``(R, K)``.
        up_MHD: First projection: ``(1, H, D)``, or ``(2, H, D)`` gated with the gate first, or
            ``(3, H, D)`` doubly gated.
        down_HD: Second projection, ``(H, D)``: a row for each hidden unit.
        widths: Hidden units of each expert, at least 1; their sum is H.
        up_bias_MH: ``(M, H)``, or None.
        down_bias_ED: ``(E, D)``, or None.
        activation: A name, or an elementwise callable.
        backend: ``"auto"``, ``"block_sparse"`` or ``"reference"``.

    Returns:
        ``(R, D)`` in x's dtype. An expert without rows gets a zero gradient.

    Raises:
        ValueError: If shapes or dtypes disagree, the forced backend cannot run this, or
            ``torch.compile`` is tracing.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            "torch.compile does not trace experts of unequal width; before compiling, set "
            "experts.forward = torch.compiler.disable(experts.forward)"
        )
    function = resolve_activation(activation)
    operands = UnequalOperands(
        x_RD, expert_RK, weight_RK, up_MHD, down_HD, up_bias_MH, down_bias_ED, tuple(widths)
    )
    _check(operands)
    check_parts(function, len(up_MHD))
    autocast = autocast_dtype(x_RD.device.type)
    dtype = x_RD.dtype if autocast is None or x_RD.dtype == torch.float64 else autocast
    with without_autocast(x_RD.device.type):
        operands = _converted(operands, dtype)
        wide = torch.promote_types(torch.float32, dtype)
        sum_dtype = torch.promote_types(wide, weight_RK.dtype)
        spec = MLPSpec(function, len(up_MHD), x_RD.dtype, sum_dtype)
        return choose(UNEQUAL_BACKENDS, _problem(operands, spec), backend).run(operands, spec)


def _matrices(operands: UnequalOperands) -> dict[str, Tensor]:
    """What takes part in the products, by name."""
    names = ("x_RD", "up_MHD", "down_HD", "up_bias_MH", "down_bias_ED")
    found = {name: getattr(operands, name) for name in names}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _converted(operands: UnequalOperands, dtype: torch.dtype) -> UnequalOperands:
    up_bias_MH, down_bias_ED = operands.up_bias_MH, operands.down_bias_ED
    return replace(
        operands,
        x_RD=operands.x_RD.to(dtype),
        up_MHD=operands.up_MHD.to(dtype),
        down_HD=operands.down_HD.to(dtype),
        up_bias_MH=None if up_bias_MH is None else up_bias_MH.to(dtype),
        down_bias_ED=None if down_bias_ED is None else down_bias_ED.to(dtype),
    )


def _problem(operands: UnequalOperands, spec: MLPSpec) -> Problem:
    device = operands.x_RD.device
    tensors = (*_matrices(operands).values(), operands.weight_RK)
    return Problem(
        device=device,
        dtype=operands.x_RD.dtype,
        num_experts=len(operands.widths),
        num_assignments=operands.expert_RK.numel(),
        dim=operands.x_RD.shape[1],
        hidden=max(operands.widths),
        needs_grad=any(t.requires_grad for t in tensors) and torch.is_grad_enabled(),
        num_parts=spec.num_parts,
        activation=known_activation(spec.activation),
        capturing=device.type == "cuda" and torch.cuda.is_current_stream_capturing(),
    )


def _check(operands: UnequalOperands) -> None:
    widths, x_RD, expert_RK = operands.widths, operands.x_RD, operands.expert_RK
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be at least 1 each and of one expert or more, got {widths}")
    if x_RD.dim() != 2 or expert_RK.dim() != 2 or len(expert_RK) != len(x_RD):
        raise ValueError(
            "x must be (rows, dim) and expert ids (rows, k), "
            f"got {tuple(x_RD.shape)} and {tuple(expert_RK.shape)}"
        )
    hidden, dim, matrices = sum(widths), x_RD.shape[1], _matrices(operands)
    parts = len(operands.up_MHD)
    if parts not in (1, 2, 3):
        raise ValueError(f"up must have 1 part, 2 if gated, or 3 if doubly gated, got {parts}")
    shapes = {
        "x_RD": tuple(x_RD.shape),
        "up_MHD": (parts, hidden, dim),
        "down_HD": (hidden, dim),
        "up_bias_MH": (parts, hidden),
        "down_bias_ED": (len(widths), dim),
    }
    for name, tensor in {**matrices, "weight_RK": operands.weight_RK}.items():
        shape = shapes.get(name, tuple(expert_RK.shape))
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    dtypes = {tensor.dtype for tensor in matrices.values()}
    if len(dtypes) > 1 and autocast_dtype(x_RD.device.type) is None:
        raise ValueError(
            f"x must have the experts' dtype, got {', '.join(sorted(map(str, dtypes)))}; "
            "convert one of them, or run under torch.autocast"
        )
