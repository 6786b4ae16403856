# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Up projection: gathered rows times the experts' matrices, and the activation behind it."""

import triton
import triton.language as tl

from expertmesh.kernels.moe_mlp.fused.activations import activate
from expertmesh.kernels.moe_mlp.fused.raster import grouped_order, row_tile
from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit
def up_kernel(
    x_ptr,
    weight_desc,
    bias_ptr,
    order_ptr,
    tile_ptr,
    num_tiles_ptr,
    pre_ptr,
    hidden_ptr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP_PRE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``hidden = activation(x[rows] W^T + b)``, gated where ``PARTS`` is 2.

    A tile takes ``COLUMNS / PARTS`` columns of gate and as many of the linear half in one product,
    so both halves of a hidden unit meet in the registers of one thread.

    ``weight_desc``: ``(E, PARTS, F, D)``, blocks ``(1, PARTS, COLUMNS / PARTS, DEPTH)``.
    ``pre``: ``(N, PARTS F)``, written with ``KEEP_PRE``; ``hidden``: ``(N, F)``.
    """
    PART: tl.constexpr = COLUMNS // PARTS
    num_columns: tl.constexpr = (HIDDEN + PART - 1) // PART
    num_rows = tl.load(num_tiles_ptr)
    for index in tl.range(
        tl.program_id(0), num_rows * num_columns, tl.num_programs(0), flatten=FLATTEN
    ):
        row, column = grouped_order(index, num_rows, num_columns, GROUP)
        expert, start, stop = row_tile(tile_ptr, row)
        position = start + tl.arange(0, ROWS)
        # Rows beyond the expert's repeat its last: a load without a mask stays asynchronous.
        token = tl.load(order_ptr + tl.minimum(position, stop - 1)) // CHOICES
        depth = tl.arange(0, DEPTH)
        x_ptrs = x_ptr + token.to(tl.int64)[:, None] * WIDTH + depth[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0:
                x = tl.load(x_ptrs + begin)
            else:
                x = tl.load(x_ptrs + begin, mask=begin + depth[None, :] < WIDTH, other=0)
            weight = weight_desc.load([expert, 0, column * PART, begin])
            weight = weight.reshape(COLUMNS, DEPTH)
            total = tl.dot(x, weight.T, total, input_precision="tf32x3")

        unit = column * PART + tl.arange(0, PART)
        inside = (position < stop)[:, None] & (unit < HIDDEN)[None, :]
        wide = position.to(tl.int64)[:, None]
        out_type: tl.constexpr = hidden_ptr.dtype.element_ty
        if PARTS == 2:
            gate, linear = total.reshape(ROWS, 2, PART).permute(0, 2, 1).split()
            if HAS_BIAS:
                bias_ptrs = bias_ptr + expert * (2 * HIDDEN) + unit
                gate += tl.load(bias_ptrs, mask=unit < HIDDEN, other=0).to(tl.float32)[None, :]
                linear += tl.load(bias_ptrs + HIDDEN, mask=unit < HIDDEN, other=0).to(tl.float32)[
                    None, :
                ]
            pre_ptrs = pre_ptr + wide * (2 * HIDDEN) + unit[None, :]
            if KEEP_PRE:
                tl.store(pre_ptrs, gate.to(out_type), mask=inside)
                tl.store(pre_ptrs + HIDDEN, linear.to(out_type), mask=inside)
            hidden = activate(gate, ACTIVATION) * linear
        else:
            if HAS_BIAS:
                bias = tl.load(bias_ptr + expert * HIDDEN + unit, mask=unit < HIDDEN, other=0)
                total += bias.to(tl.float32)[None, :]
            if KEEP_PRE:
                pre_ptrs = pre_ptr + wide * HIDDEN + unit[None, :]
                tl.store(pre_ptrs, total.to(out_type), mask=inside)
            hidden = activate(total, ACTIVATION)
        hidden_ptrs = hidden_ptr + wide * HIDDEN + unit[None, :]
        tl.store(hidden_ptrs, hidden.to(out_type), mask=inside)
