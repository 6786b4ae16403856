# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Products of block-sparse and dense matrices in Triton.

``unit_ptr`` holds slab, first unit and width of each block (``Topology.unit_Z3``).
Blocks' padding may hold anything: where it would enter a sum it is read as zero, on both sides of
the product, so that no infinity gets through. Sums run in float32 and in a fixed order.
"""

import triton
import triton.language as tl

from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit
def sdd_kernel(
    left_ptr,
    right_ptr,
    value_ptr,
    used_ptr,
    walk_ptr,
    row_ptr,
    unit_ptr,
    left_row,
    left_depth,
    right_matrix,
    right_slab,
    right_unit,
    right_depth,
    value_matrix,
    DIM: tl.constexpr,
    MATRICES: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One block of ``left right^T``; padded columns repeat the last unit."""
    turn = tl.program_id(0) // MATRICES
    matrix = tl.program_id(0) % MATRICES
    if turn >= tl.load(used_ptr):
        return
    block = tl.load(walk_ptr + turn).to(tl.int64)
    row = tl.load(row_ptr + block).to(tl.int64)
    slab = tl.load(unit_ptr + block * 3).to(tl.int64)
    place = tl.arange(0, BLOCK)
    unit = tl.multiple_of(tl.load(unit_ptr + block * 3 + 1), ALIGN)
    if WHOLE:
        unit += place
    else:
        unit += tl.minimum(place, tl.load(unit_ptr + block * 3 + 2) - 1)
    depth = tl.arange(0, DEPTH)
    left_ptrs = left_ptr + (row * BLOCK + place)[:, None] * left_row
    left_ptrs += depth.to(tl.int64)[None, :] * left_depth
    right_ptrs = right_ptr + matrix.to(tl.int64) * right_matrix + slab * right_slab
    right_ptrs += unit.to(tl.int64)[None, :] * right_unit
    right_ptrs += depth.to(tl.int64)[:, None] * right_depth
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for begin in range(0, DIM, DEPTH):
        if DIM % DEPTH == 0:
            left = tl.load(left_ptrs)
            right = tl.load(right_ptrs)
        else:
            left = tl.load(left_ptrs, mask=begin + depth[None, :] < DIM, other=0)
            right = tl.load(right_ptrs, mask=begin + depth[:, None] < DIM, other=0)
        total = tl.dot(left, right, total, input_precision="tf32x3")
        left_ptrs += DEPTH * left_depth
        right_ptrs += DEPTH * right_depth
    value_ptrs = value_ptr + matrix.to(tl.int64) * value_matrix + block * (BLOCK * BLOCK)
    value_ptrs += place[:, None] * BLOCK + place[None, :]
    tl.store(value_ptrs, total.to(value_ptr.dtype.element_ty))


@remembered
@triton.jit
def dsd_kernel(
    value_ptr,
    right_ptr,
    out_ptr,
    offset_ptr,
    unit_ptr,
    count_ptr,
    value_matrix,
    value_block,
    value_row,
    right_matrix,
    right_slab,
    right_unit,
    right_dim,
    out_row,
    out_dim,
    DIM: tl.constexpr,
    MATRICES: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of rows by a tile of columns of ``sum_m A_m right_m``; padded rows become zero."""
    TILES: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    STEPS: tl.constexpr = BLOCK // DEPTH
    row = tl.program_id(0) // TILES
    count = tl.load(count_ptr + row)
    if count == 0:
        return
    start = tl.load(offset_ptr + row) * STEPS
    stop = tl.load(offset_ptr + row + 1) * STEPS
    place = tl.arange(0, BLOCK)
    dim = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    EVEN: tl.constexpr = DIM % COLUMNS == 0
    right_dims = dim.to(tl.int64)[None, :] * right_dim
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for matrix in range(MATRICES):
        values_ptr = value_ptr + tl.cast(matrix, tl.int64) * value_matrix
        dense_ptr = right_ptr + tl.cast(matrix, tl.int64) * right_matrix
        for step in range(start, stop):
            block = tl.cast(step // STEPS, tl.int64)
            inner = step % STEPS * DEPTH + tl.arange(0, DEPTH)
            slab = tl.load(unit_ptr + block * 3).to(tl.int64)
            unit = tl.multiple_of(tl.load(unit_ptr + block * 3 + 1), ALIGN) + inner
            value_ptrs = values_ptr + block * value_block
            value_ptrs += place[:, None] * value_row + inner[None, :]
            right_ptrs = dense_ptr + slab * right_slab
            right_ptrs += unit.to(tl.int64)[:, None] * right_unit + right_dims
            if WHOLE and EVEN:
                value = tl.load(value_ptrs)
                right = tl.load(right_ptrs)
            else:
                width = tl.multiple_of(tl.load(unit_ptr + block * 3 + 2), ALIGN)
                inside = inner < width
                value = tl.load(value_ptrs, mask=inside[None, :], other=0)
                within = inside[:, None] & (dim < DIM)[None, :]
                right = tl.load(right_ptrs, mask=within, other=0)
            total = tl.dot(value, right, total, input_precision="tf32x3")
    total = tl.where((place < count)[:, None], total, 0)
    out_ptrs = out_ptr + (row.to(tl.int64) * BLOCK + place)[:, None] * out_row
    out_ptrs += dim.to(tl.int64)[None, :] * out_dim
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(dim < DIM)[None, :])


@remembered
@triton.jit
def dsd_transposed_kernel(
    value_ptr,
    right_ptr,
    out_ptr,
    offset_ptr,
    transposed_ptr,
    slab_ptr,
    first_ptr,
    width_ptr,
    value_matrix,
    value_block,
    value_row,
    right_row,
    right_dim,
    out_matrix,
    out_slab,
    out_unit,
    out_dim,
    DIM: tl.constexpr,
    MATRICES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of units by a tile of columns of ``A_m^T right``, through the secondary index."""
    TILES: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    STEPS: tl.constexpr = BLOCK // DEPTH
    dim = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)
    matrix = (tl.program_id(0) // TILES % MATRICES).to(tl.int64)
    column = tl.program_id(0) // (TILES * MATRICES)
    start = tl.load(offset_ptr + column) * STEPS
    stop = tl.load(offset_ptr + column + 1) * STEPS
    place = tl.arange(0, BLOCK)
    values_ptr = value_ptr + matrix * value_matrix
    right_dims = dim.to(tl.int64)[None, :] * right_dim
    total = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for step in range(start, stop):
        entry = transposed_ptr + step // STEPS * 3
        block = tl.load(entry).to(tl.int64)
        row = tl.load(entry + 1).to(tl.int64)
        inner = step % STEPS * DEPTH + tl.arange(0, DEPTH)
        inside = (inner < tl.load(entry + 2))[:, None]
        value_ptrs = values_ptr + block * value_block + inner[:, None] * value_row + place[None, :]
        right_ptrs = right_ptr + (row * BLOCK + inner)[:, None] * right_row + right_dims
        value = tl.load(value_ptrs, mask=inside, other=0)
        if DIM % COLUMNS != 0:
            inside = inside & (dim < DIM)[None, :]
        right = tl.load(right_ptrs, mask=inside, other=0)
        total = tl.dot(value.T, right, total, input_precision="tf32x3")
    slab = tl.load(slab_ptr + column).to(tl.int64)
    unit = (tl.multiple_of(tl.load(first_ptr + column), ALIGN) + place).to(tl.int64)
    width = tl.multiple_of(tl.load(width_ptr + column), ALIGN)
    kept = (place < width)[:, None] & (dim < DIM)[None, :]
    out_ptrs = out_ptr + matrix * out_matrix + slab * out_slab + unit[:, None] * out_unit
    out_ptrs += dim.to(tl.int64)[None, :] * out_dim
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=kept)


@remembered
@triton.jit
def row_dots_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    offset_ptr,
    unit_ptr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The dot product of each row of two matrices, for one block of rows."""
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.load(offset_ptr + row), tl.load(offset_ptr + row + 1)):
        width = tl.load(unit_ptr + block * 3 + 2)
        for begin in range(0, BLOCK, COLUMNS):
            unit = begin + tl.arange(0, COLUMNS)
            cell = (
                tl.cast(block, tl.int64) * (BLOCK * BLOCK) + place[:, None] * BLOCK + unit[None, :]
            )
            inside = (unit < width)[None, :]
            a = tl.load(a_ptr + cell, mask=inside, other=0).to(tl.float32)
            b = tl.load(b_ptr + cell, mask=inside, other=0).to(tl.float32)
            total += tl.sum(a * b, axis=1)
    tl.store(out_ptr + row.to(tl.int64) * BLOCK + place, total)
