# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""In which order a persistent program walks over output tiles."""

import triton
import triton.language as tl


@triton.jit
def row_tile(tile_ptr, index):
    """Expert, first position and end of the expert's positions, of a row tile."""
    expert = tl.load(tile_ptr + index * 3)
    start = tl.load(tile_ptr + index * 3 + 1)
    stop = tl.load(tile_ptr + index * 3 + 2)
    return expert, start, stop


@triton.jit
def grouped_order(index, num_rows, num_columns, GROUP: tl.constexpr):
    """Row and column of the tile at ``index``: ``GROUP`` rows sweep all columns together.

    The rows' operand is then read once, and a column's is shared by the group in the L2 cache.
    """
    span = GROUP * num_columns
    first = (index // span) * GROUP
    size = min(num_rows - first, GROUP)
    within = index % span
    return first + within % size, within // size
