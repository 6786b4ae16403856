# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""What only moves memory: copies, and sums in a fixed order over blocks and rows."""

import triton
import triton.language as tl

from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit
def spread_kernel(
    rows_ptr,
    inverse_ptr,
    out_ptr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out[inverse[r, k]] = rows[r]`` for every choice that has a position; a row is read once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(rows_ptr + row * WIDTH + column, mask=column < WIDTH)
    for choice in tl.static_range(CHOICES):
        position = tl.load(inverse_ptr + row * CHOICES + choice).to(tl.int64)
        real = column < tl.where(position >= 0, WIDTH, 0)
        tl.store(out_ptr + position * WIDTH + column, value, mask=real)


@remembered
@triton.jit(do_not_specialize=["num_assignments"])
def share_sum_kernel(
    share_ptr,
    inverse_ptr,
    out_ptr,
    num_assignments,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of the combine weights from the shares of ``BLOCKS`` column blocks; 0 if none."""
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < num_assignments
    position = tl.load(inverse_ptr + place, mask=inside, other=-1).to(tl.int64)
    block = tl.arange(0, COLUMNS)
    mask = (position >= 0)[:, None] & (block < BLOCKS)[None, :]
    share = tl.load(share_ptr + position[:, None] * BLOCKS + block[None, :], mask=mask, other=0)
    tl.store(out_ptr + place, tl.sum(share, axis=1).to(out_ptr.dtype.element_ty), mask=inside)


@remembered
@triton.jit
def expert_sum_kernel(
    rows_ptr,
    order_ptr,
    weight_ptr,
    offset_ptr,
    out_ptr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum of each expert's rows: grouped rows, or if ``GATHERED`` weighted rows by token."""
    expert = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(offset_ptr + expert)
    stop = tl.load(offset_ptr + expert + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in tl.range(start, stop, ROWS):
        position = begin + tl.arange(0, ROWS)
        real = position < stop
        mask = real[:, None] & (column < WIDTH)[None, :]
        if GATHERED:
            assignment = tl.load(order_ptr + position, mask=real, other=0)
            source = assignment // CHOICES
        else:
            source = position
        rows_ptrs = rows_ptr + source.to(tl.int64)[:, None] * WIDTH + column[None, :]
        rows = tl.load(rows_ptrs, mask=mask, other=0).to(tl.float32)
        if GATHERED:
            weight = tl.load(weight_ptr + assignment, mask=real, other=0).to(tl.float32)
            rows *= weight[:, None]
        total += rows
    out_ptrs = out_ptr + expert.to(tl.int64) * WIDTH + column
    result = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, result, mask=column < WIDTH)
