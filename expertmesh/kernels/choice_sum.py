# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""The rows of each token's choices, read from where they lie and added in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.remembered import remembered


def sum_choices(
    rows_ND: Tensor,
    inverse_N: Tensor,
    out_RD: Tensor,
    *,
    weight_RK: Tensor | None = None,
    expert_RK: Tensor | None = None,
    bias_ED: Tensor | None = None,
) -> Tensor:
    """Fill ``out_RD`` with the sum over each row's choices, weighted or not."""
    num_rows, dim = out_RD.shape
    columns = min(4096, power_of_2(dim))
    gather_sum_kernel[(num_rows, ceil_div(dim, columns))](
        rows_ND,
        inverse_N,
        weight_RK if weight_RK is not None else rows_ND,
        expert_RK if bias_ED is not None else inverse_N,
        bias_ED if bias_ED is not None else rows_ND,
        out_RD,
        inverse_N.numel() // num_rows,
        dim,
        weight_RK is not None,
        bias_ED is not None,
        columns,
        num_warps=max(1, min(8, columns // 256)),
    )
    return out_RD


@remembered
@triton.jit
def gather_sum_kernel(
    rows_ptr,
    inverse_ptr,
    weight_ptr,
    expert_ptr,
    bias_ptr,
    out_ptr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out[r] = sum_k weight[r, k] (rows[inverse[r, k]] + bias[expert[r, k]])`` in float32."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    total = tl.zeros((COLUMNS,), tl.float32)
    for choice in tl.static_range(CHOICES):
        position = tl.load(inverse_ptr + row * CHOICES + choice).to(tl.int64)
        valid = position >= 0
        real = column < tl.where(valid, WIDTH, 0)
        value = tl.load(rows_ptr + position * WIDTH + column, mask=real, other=0)
        value = value.to(tl.float32)
        if HAS_BIAS:
            expert = tl.load(expert_ptr + row * CHOICES + choice)
            bias = tl.load(bias_ptr + expert * WIDTH + column, mask=real, other=0)
            value += bias.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + row * CHOICES + choice).to(tl.float32)
            value *= tl.where(valid, weight, 0)
        total += value
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + column, out, mask=inside)
