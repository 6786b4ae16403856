# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Products of grouped rows with their expert's matrix: the down projection, and x's gradient."""

import triton
import triton.language as tl

from expertmesh.kernels.moe_mlp.fused.raster import grouped_order, row_tile
from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit
def rows_kernel(
    rows_desc,
    weight_desc,
    tile_ptr,
    num_tiles_ptr,
    out_ptr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLATTEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``out = rows W``, or ``rows W^T`` if ``TRANSPOSED``, with the inner dim in ``PARTS``.

    ``rows_desc``: ``(N, PARTS INNER)``. ``weight_desc``: ``(E, PARTS, INNER, OUTER)``, or with
    ``TRANSPOSED`` ``(E, 1, OUTER, INNER)``; what it reads beyond ``INNER`` is 0. ``out``:
    ``(N, OUTER)``. Router weights and the sum over choices are left to whoever gathers the rows:
    scattered stores are slower than writing and gathering them.
    """
    num_columns: tl.constexpr = (OUTER + COLUMNS - 1) // COLUMNS
    steps: tl.constexpr = (INNER + DEPTH - 1) // DEPTH
    num_rows = tl.load(num_tiles_ptr)
    for index in tl.range(
        tl.program_id(0),
        num_rows * num_columns,
        tl.num_programs(0),
        flatten=FLATTEN,
    ):
        row, column = grouped_order(index, num_rows, num_columns, GROUP)
        expert, start, stop = row_tile(tile_ptr, row)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(PARTS * steps):
            part = step // steps
            begin = (step % steps) * DEPTH
            rows = rows_desc.load([start, part * INNER + begin])
            if TRANSPOSED:
                weight = weight_desc.load([expert, part, column * COLUMNS, begin])
                weight = weight.reshape(COLUMNS, DEPTH).T
            else:
                weight = weight_desc.load([expert, part, begin, column * COLUMNS])
                weight = weight.reshape(DEPTH, COLUMNS)
            total = tl.dot(rows, weight, total, input_precision="tf32x3")
        position = start + tl.arange(0, ROWS)
        out = column * COLUMNS + tl.arange(0, COLUMNS)
        inside = (position < stop)[:, None] & (out < OUTER)[None, :]
        out_ptrs = out_ptr + position.to(tl.int64)[:, None] * OUTER + out[None, :]
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)
