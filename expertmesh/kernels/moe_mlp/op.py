"""The operation as the rest of the library calls it: checks, dtypes, and the choice of backend."""

import torch
from torch import Tensor

from expertmesh.kernels.activations import (
    Activation,
    check_parts,
    known_activation,
    resolve_activation,
)
from expertmesh.kernels.backends import Problem, choose
from expertmesh.kernels.dtypes import autocast_dtype, without_autocast
from expertmesh.kernels.moe_mlp.block_sparse.backend import BlockSparseMLP
from expertmesh.kernels.moe_mlp.decode import DecodeMLP
from expertmesh.kernels.moe_mlp.dropout import HiddenDropout
from expertmesh.kernels.moe_mlp.gather import GatherMLP
from expertmesh.kernels.moe_mlp.grouped import GroupedMLP
from expertmesh.kernels.moe_mlp.loop import LoopMLP
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec
from expertmesh.kernels.moe_mlp.quack import QuackMLP
from expertmesh.kernels.moe_mlp.reference import ReferenceMLP
from expertmesh.kernels.moe_mlp.triton import TritonMLP

MLP_BACKENDS: tuple[MLPBackend, ...] = (
    DecodeMLP(),
    GatherMLP(),
    QuackMLP(),
    TritonMLP(),
    GroupedMLP(),
    LoopMLP(),
    BlockSparseMLP(),
    ReferenceMLP(),
)
"""Most specialised first: ``auto`` takes the first that can run the problem and suits it."""


def moe_mlp(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str | Activation = "silu",
    dropout: HiddenDropout | None = None,
    draw_R: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weighted sum of each row's experts, ``y_r = sum_k weight_rk * expert_rk(x_r)``.

    Grouping rows by expert, the matrix products, the activation and the weighted sum are one
    operation with one gradient. It saves x and the pre-activation. The sum over k runs in float32
    or wider, in a fixed order. Repeated runs on one device give the same bits. Under autocast
    the products run in the autocast dtype, in which x and the matrices are saved too; the output
    has x's dtype.

    Args:
        x_RD: Rows, ``(R, D)``.
        expert_RK: Expert ids ``(R, K)``, integers from 0 to E; the sentinel E contributes
            nothing to the output nor to any gradient, whatever its weight holds.
        weight_RK: Combine weights, ``(R, K)``.
        up: ``(E, F, D)``; for gated experts ``(E, 2, F, D)`` with the gate at index 0; for doubly
            gated ones, ``down(a * activation(g) * u)``, ``(E, 3, F, D)`` with a, g and u.
        down: ``(E, D, F)``.
        up_bias: ``up``'s shape without D, or None.
        down_bias: ``(E, D)``, or None.
        activation: A name (silu, gelu, gelu_tanh, relu, relu2; for gated experts also
            clamped_swiglu) or an elementwise callable.
        dropout: Of hidden units, or None.
        draw_R: int64 ``(R,)``, a random number for each row; given with ``dropout``.
        backend: ``"auto"``, or one of decode, gather, quack, triton,
            grouped_mm, loop, block_sparse, reference.

    Returns:
        ``(R, D)`` in x's dtype. An expert without rows gets a zero gradient.

    Raises:
        ValueError: If shapes or dtypes disagree, or the forced backend cannot run this.
    """
    _check_shapes(x_RD, expert_RK, weight_RK, up, down, up_bias, down_bias)
    if (dropout is None) != (draw_R is None):
        raise ValueError("dropout and draw_R go together; give both or neither")
    _check_ids(expert_RK, up.shape[0])
    dtype = _product_dtype(x_RD, (up, down, up_bias, down_bias))
    with without_autocast(x_RD.device.type):
        operands = MLPOperands(
            x_RD.to(dtype),
            expert_RK,
            weight_RK,
            up.to(dtype),
            down.to(dtype),
            None if up_bias is None else up_bias.to(dtype),
            None if down_bias is None else down_bias.to(dtype),
            draw_R,
        )
        wide = torch.promote_types(torch.float32, dtype)
        sum_dtype = torch.promote_types(wide, weight_RK.dtype)
        num_parts = up.shape[1] if up.dim() == 4 else 1
        function = resolve_activation(activation)
        check_parts(function, num_parts)
        spec = MLPSpec(function, num_parts, x_RD.dtype, sum_dtype, dropout)
        return choose(MLP_BACKENDS, _problem(operands, spec), backend).run(operands, spec)


def _problem(operands: MLPOperands, spec: MLPSpec) -> Problem:
    device = operands.x_RD.device
    compiling = torch.compiler.is_compiling()
    on_stream = device.type == "cuda" and not compiling
    return Problem(
        device=device,
        dtype=operands.x_RD.dtype,
        num_experts=operands.num_experts,
        num_assignments=operands.expert_RK.numel(),
        dim=operands.down_EDF.shape[1],
        hidden=operands.down_EDF.shape[2],
        needs_grad=operands.needs_grad,
        num_parts=spec.num_parts,
        activation=known_activation(spec.activation),
        dropout=spec.dropout is not None,
        compiling=compiling,
        capturing=on_stream and torch.cuda.is_current_stream_capturing(),
    )


def _product_dtype(x_RD: Tensor, parameters: tuple[Tensor | None, ...]) -> torch.dtype:
    autocast = autocast_dtype(x_RD.device.type)
    if autocast is not None and x_RD.dtype != torch.float64:
        return autocast
    for parameter in parameters:
        if parameter is not None and parameter.dtype != x_RD.dtype:
            raise ValueError(
                f"x must have the experts' dtype {parameter.dtype}, got {x_RD.dtype}; "
                "convert one of them, or run under torch.autocast"
            )
    return x_RD.dtype


def _check_ids(expert_RK: Tensor, num_experts: int) -> None:
    """On the CPU only: elsewhere the check would wait for the device."""
    if torch.compiler.is_compiling() or expert_RK.device.type != "cpu" or expert_RK.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(expert_RK))
    if low < 0 or high > num_experts:
        raise ValueError(
            f"expert ids must be between 0 and num_experts={num_experts} (which means no expert), "
            f"got {low} to {high}"
        )


def _check_shapes(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    if up.dim() not in (3, 4) or (up.dim() == 4 and up.shape[1] not in (2, 3)):
        raise ValueError(
            "up must be (E, F, D), (E, 2, F, D) if gated, or (E, 3, F, D) if doubly gated, "
            f"got {tuple(up.shape)}"
        )
    num_experts, hidden, dim = up.shape[0], up.shape[-2], up.shape[-1]
    if x_RD.dim() != 2 or x_RD.shape[1] != dim:
        raise ValueError(f"x must be (rows, dim={dim}), got {tuple(x_RD.shape)}")
    if expert_RK.is_floating_point() or expert_RK.dim() != 2 or len(expert_RK) != len(x_RD):
        raise ValueError(
            f"expert ids must be integers of shape (rows={len(x_RD)}, k), got {expert_RK.dtype} "
            f"of shape {tuple(expert_RK.shape)}"
        )
    expected = {
        "weights": (weight_RK, tuple(expert_RK.shape)),
        "down": (down, (num_experts, dim, hidden)),
        "up_bias": (up_bias, tuple(up.shape[:-1])),
        "down_bias": (down_bias, (num_experts, dim)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
