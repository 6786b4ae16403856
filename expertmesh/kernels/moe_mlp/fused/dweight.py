# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Gradients of the experts' matrices: sums over each expert's rows."""

import triton
import triton.language as tl

from expertmesh.kernels.moe_mlp.fused.raster import grouped_order
from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit
def dweight_kernel(
    rows_desc,
    gathered_ptr,
    order_ptr,
    offset_ptr,
    longest_ptr,
    out_ptr,
    stride_expert,
    stride_part,
    stride_inner,
    stride_outer,
    NUM_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    PARTS: tl.constexpr,
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out[e] = rows^T gathered`` over the rows of expert ``e``; zeros where it has none.

    Experts with most rows come first: a program that ends late has then only short ones ahead.

    ``rows_desc``: ``(N, PARTS INNER)``, grouped, zero behind the last expert's rows. ``gathered``:
    ``(R, OUTER)``, by token. ``out``: ``(E, PARTS, INNER, OUTER)`` by strides; ``FLIP`` says that
    ``INNER`` is its contiguous dim.
    """
    num_rows: tl.constexpr = PARTS * ((INNER + ROWS - 1) // ROWS)
    num_columns: tl.constexpr = (OUTER + COLUMNS - 1) // COLUMNS
    per_expert: tl.constexpr = num_rows * num_columns
    for index in tl.range(tl.program_id(0), NUM_EXPERTS * per_expert, tl.num_programs(0)):
        expert = tl.load(longest_ptr + index // per_expert)
        row, column = grouped_order(index % per_expert, num_rows, num_columns, GROUP)
        part = row // (num_rows // PARTS)
        first = (row % (num_rows // PARTS)) * ROWS
        start = tl.load(offset_ptr + expert)
        stop = tl.load(offset_ptr + expert + 1)
        outer = column * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in tl.range(start, stop, DEPTH):
            position = begin + tl.arange(0, DEPTH)
            real = position < stop
            token = tl.load(order_ptr + position, mask=real, other=0) // CHOICES
            gathered_ptrs = gathered_ptr + token.to(tl.int64)[:, None] * OUTER + outer[None, :]
            if OUTER % COLUMNS == 0:
                gathered = tl.load(gathered_ptrs, mask=real[:, None], other=0)
            else:
                mask = real[:, None] & (outer < OUTER)[None, :]
                gathered = tl.load(gathered_ptrs, mask=mask, other=0)
            rows = rows_desc.load([begin, part * INNER + first])
            total = tl.dot(rows.T, gathered, total, input_precision="tf32x3")
        inner = first + tl.arange(0, ROWS)
        base = out_ptr + expert.to(tl.int64) * stride_expert + part * stride_part
        result = total.to(out_ptr.dtype.element_ty)
        if FLIP:
            inside = (outer < OUTER)[:, None] & (inner < INNER)[None, :]
            out_ptrs = base + outer.to(tl.int64)[:, None] * stride_outer + inner[None, :]
            tl.store(out_ptrs, result.T, mask=inside)
        else:
            inside = (inner < INNER)[:, None] & (outer < OUTER)[None, :]
            out_ptrs = base + inner.to(tl.int64)[:, None] * stride_inner + outer[None, :]
            tl.store(out_ptrs, result, mask=inside)
