"""Fused kernels for training on Hopper: gathers, activation and its gradient inside the products.

Two operations of the library and one autograd function over them, which ``torch.compile`` traces
without looking inside. Triton is imported when they run. They are defined with
``torch.library.define``: ``custom_op`` imports the compiler at the first call.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from expertmesh.kernels.activations import known_activation
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.dtypes import without_autocast
from expertmesh.kernels.first_order import first_order
from expertmesh.kernels.moe_mlp.problem import (
    ALIGNMENT,
    MLPBackend,
    MLPOperands,
    MLPSpec,
    misaligned,
)
from expertmesh.kernels.triton_support import capability, on_its_device, triton_refusal

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")
_MOST_EXPERTS = 4095  # their counts, sentinel included, are one program's to sort
_MOST_ASSIGNMENTS = 2**29  # the layout's tables of counts are addressed in 32 bits
_FEWEST_ROWS_PER_EXPERT = 8  # below, tiles of 64 rows are mostly empty


class FusedMLP(MLPBackend):
    """Grouped products with everything between them fused; bitwise reproducible.

    Attributes:
        quack: Whether some of the products may be QuACK's.
    """

    quack: ClassVar[bool]

    def refusal(self, problem: Problem) -> str | None:
        if problem.activation not in ACTIVATIONS:
            return f"its activations are {', '.join(ACTIVATIONS)}"
        if problem.dropout:
            return "it drops no hidden units"
        if problem.num_parts > 2:
            return "it has no doubly gated product"
        if problem.dtype not in DTYPES:
            return f"it takes bfloat16, float16 and float32, not {problem.dtype}"
        if problem.num_experts > _MOST_EXPERTS:
            return f"it takes at most {_MOST_EXPERTS} experts, got {problem.num_experts}"
        if problem.num_assignments > _MOST_ASSIGNMENTS:
            return f"it takes at most 2^29 choices of experts, got {problem.num_assignments}"
        return misaligned(problem) or _device_refusal(problem)

    def suits(self, problem: Problem) -> bool:
        """For many rows: with few, reading the weights is what takes time."""
        many = problem.num_assignments >= _FEWEST_ROWS_PER_EXPERT * problem.num_experts
        # What else takes float32 cannot be recorded, or copies matrices for each choice.
        dtype = problem.dtype != torch.float32 or problem.capturing
        return problem.device.type == "cuda" and dtype and (many or problem.needs_grad)

    def run(self, operands: MLPOperands, spec: MLPSpec) -> Tensor:
        up, up_bias = operands.up, operands.up_bias
        return _FusedFunction.apply(
            operands.x_RD,
            operands.weight_RK,
            up if spec.num_parts > 1 else up.unsqueeze(1),
            operands.down_EDF,
            up_bias if spec.num_parts > 1 or up_bias is None else up_bias.unsqueeze(1),
            operands.down_bias_ED,
            operands.expert_RK,
            spec,
            operands.needs_grad,
            self.quack,
        )


class TritonMLP(FusedMLP):
    """By Triton and torch alone."""

    name: ClassVar[str] = "triton"
    summary: ClassVar[str] = "fused Triton kernels for training; Hopper GPUs, 16 and 32 bits"
    quack: ClassVar[bool] = False


def _device_refusal(problem: Problem) -> str | None:
    refusal = triton_refusal(problem.device)
    if refusal is not None or problem.device.type == "cpu":
        return refusal
    major, minor = capability(problem.device)
    if major != 9:
        return f"its kernels are for compute capability 9, this device has {major}.{minor}"
    return None


class _FusedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_RK: Tensor,
        up_EPFD: Tensor,
        down_EDF: Tensor,
        up_bias: Tensor | None,
        down_bias_ED: Tensor | None,
        expert_RK: Tensor,
        spec: MLPSpec,
        keep: bool,
        quack: bool,
    ) -> Tensor:
        name = known_activation(spec.activation)
        y_RD, *kept = torch.ops.expertmesh.fused_mlp(
            x_RD,
            expert_RK,
            weight_RK,
            up_EPFD,
            down_EDF,
            up_bias,
            down_bias_ED,
            name,
            spec.out_dtype,
            keep,
        )
        if keep:
            operands = (x_RD, weight_RK, up_EPFD, down_EDF, up_bias, down_bias_ED)
            ctx.save_for_backward(*operands, *kept)
            ctx.activation, ctx.quack = name, quack
        return y_RD

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:6])
        with without_autocast(dy_RD.device.type):
            grads = torch.ops.expertmesh.fused_mlp_backward(
                dy_RD, *ctx.saved_tensors, ctx.activation, wanted, ctx.quack
            )
        return (
            *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
            *[None] * 4,
        )


_LAYOUT = "Tensor order, Tensor inverse, Tensor offset, Tensor longest, Tensor tile, Tensor tiles"
torch.library.define(
    "expertmesh::fused_mlp",
    "(Tensor x, Tensor expert, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, "
    "Tensor? down_bias, str activation, ScalarType out_dtype, bool keep) "
    f"-> (Tensor y, Tensor pre, {_LAYOUT})",
)
torch.library.define(
    "expertmesh::fused_mlp_backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor up, Tensor down, Tensor? up_bias, "
    f"Tensor? down_bias, Tensor pre, {_LAYOUT}, str activation, bool[] wanted, bool quack) "
    "-> (Tensor dx, Tensor dweight, Tensor dup, Tensor ddown, Tensor dup_bias, Tensor ddown_bias)",
)


@torch.library.impl("expertmesh::fused_mlp", "CompositeExplicitAutograd")
@on_its_device
def _fused_mlp(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up_EPFD: Tensor,
    down_EDF: Tensor,
    up_bias: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, ...]:
    from expertmesh.kernels.moe_mlp.fused import run

    y_RD, pre_NH, layout = run.forward(
        x_RD.contiguous(),
        expert_RK.contiguous(),
        weight_RK.contiguous(),
        _from_aligned_start(_with_whole_rows(up_EPFD)),
        _from_aligned_start(down_EDF.contiguous()),
        None if up_bias is None else up_bias.contiguous(),
        None if down_bias_ED is None else down_bias_ED.contiguous(),
        activation,
        out_dtype,
        keep=keep,
    )
    return (y_RD, pre_NH, *layout)


@torch.library.impl("expertmesh::fused_mlp_backward", "CompositeExplicitAutograd")
@on_its_device
def _fused_mlp_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    weight_RK: Tensor,
    up_EPFD: Tensor,
    down_EDF: Tensor,
    up_bias: Tensor | None,
    down_bias_ED: Tensor | None,
    pre_NH: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    from expertmesh.kernels.layout import Layout
    from expertmesh.kernels.moe_mlp.fused import run

    *layout, activation, wanted, quack = rest
    return tuple(
        run.backward(
            _from_aligned_start(dy_RD.to(x_RD.dtype).contiguous()),
            _from_aligned_start(x_RD.contiguous()),
            weight_RK.contiguous(),
            _from_aligned_start(_with_whole_rows(up_EPFD)),
            _from_aligned_start(down_EDF.contiguous()),
            None if up_bias is None else up_bias.contiguous(),
            None if down_bias_ED is None else down_bias_ED.contiguous(),
            pre_NH,
            Layout(*layout),
            activation,
            wanted,
            quack=quack,
        )
    )


def _with_whole_rows(up_EPFD: Tensor) -> Tensor:
    """Itself where the copy engine can read its rows: any order of gate and up, without a copy."""
    whole = up_EPFD.stride(-1) == 1 and all(
        stride * up_EPFD.itemsize % ALIGNMENT == 0 for stride in up_EPFD.stride()[:-1]
    )
    return up_EPFD if whole else up_EPFD.contiguous()


def _from_aligned_start(rows: Tensor) -> Tensor:
    """Itself, or a copy where it is a part of a buffer that starts anywhere."""
    return rows if rows.data_ptr() % ALIGNMENT == 0 else rows.clone()


@torch.library.register_fake("expertmesh::fused_mlp")
def _fused_mlp_fake(
    x_RD: Tensor,
    expert_RK: Tensor,
    weight_RK: Tensor,
    up_EPFD: Tensor,
    down_EDF: Tensor,
    up_bias: Tensor | None,
    down_bias_ED: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, ...]:
    from expertmesh.kernels.moe_mlp.fused import run

    _, parts, hidden, _ = up_EPFD.shape
    pre_NH = x_RD.new_empty((expert_RK.numel(), parts * hidden) if keep else (0,))
    layout = run.unwritten_layout(x_RD, expert_RK, up_EPFD)
    return (x_RD.new_empty(x_RD.shape, dtype=out_dtype), pre_NH, *layout)


@torch.library.register_fake("expertmesh::fused_mlp_backward")
def _fused_mlp_backward_fake(
    dy_RD: Tensor,
    x_RD: Tensor,
    weight_RK: Tensor,
    up_EPFD: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, wanted, _ = rest
    whole = [None if operand is None else operand.contiguous() for operand in rest[:3]]
    # As laid out by the time the kernels see them, which is how their gradients are.
    operands = (x_RD.contiguous(), weight_RK.contiguous(), _with_whole_rows(up_EPFD), *whole)
    return tuple(
        torch.empty_like(operand) if want and operand is not None else x_RD.new_empty(0)
        for operand, want in zip(operands, wanted, strict=True)
    )
