# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Gradient of the pre-activation, and with it all that is elementwise in the backward pass."""

import triton
import triton.language as tl

from expertmesh.kernels.moe_mlp.fused.activations import activate_with_slope
from expertmesh.kernels.moe_mlp.fused.raster import grouped_order, row_tile
from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit(do_not_specialize=["num_assignments"])
def dhidden_kernel(
    dy_ptr,
    down_desc,
    combine_ptr,
    order_ptr,
    offset_ptr,
    tile_ptr,
    num_tiles_ptr,
    pre_ptr,
    dpre_ptr,
    hidden_ptr,
    share_ptr,
    num_assignments,
    NUM_EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``dpre``, the weighted hidden units, and each column block's share of the weights' gradient.

    With ``dh = dy[rows] W`` before weighting: the gradient of a combine weight is
    ``<dy, W h> = <dh, h>`` (SonicMoE, arXiv 2512.14080), so the expert's output is not needed;
    ``hidden = weight * h`` is what the down projection's gradient multiplies with ``dy``.

    ``down_desc``: ``(E, 1, D, F)``. ``share``: ``(N, blocks of columns)`` in float32. Behind the
    last expert's rows its last tile is filled with zeros, for a reader in steps of rows.
    """
    num_columns: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    num_rows = tl.load(num_tiles_ptr)
    num_valid = tl.load(offset_ptr + NUM_EXPERTS)
    for index in tl.range(
        tl.program_id(0), num_rows * num_columns, tl.num_programs(0), flatten=FLATTEN
    ):
        row, column = grouped_order(index, num_rows, num_columns, GROUP)
        expert, start, stop = row_tile(tile_ptr, row)
        position = start + tl.arange(0, ROWS)
        assignment = tl.load(order_ptr + tl.minimum(position, stop - 1))
        token = assignment // CHOICES
        depth = tl.arange(0, DEPTH)
        dy_ptrs = dy_ptr + token.to(tl.int64)[:, None] * WIDTH + depth[None, :]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for begin in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0:
                dy = tl.load(dy_ptrs + begin)
            else:
                dy = tl.load(dy_ptrs + begin, mask=begin + depth[None, :] < WIDTH, other=0)
            down = down_desc.load([expert, 0, begin, column * COLUMNS])
            total = tl.dot(dy, down.reshape(DEPTH, COLUMNS), total, input_precision="tf32x3")

        weight = tl.load(combine_ptr + assignment).to(tl.float32)
        limit = tl.where(stop == num_valid, tl.minimum(start + ROWS, num_assignments), stop)
        share = _finish(
            total, weight, position, stop, limit, column * COLUMNS,
            pre_ptr, dpre_ptr, hidden_ptr, HIDDEN, PARTS, ACTIVATION, CHUNKS,
        )  # fmt: skip
        share_ptrs = share_ptr + position.to(tl.int64) * num_columns + column
        tl.store(share_ptrs, share, mask=position < stop)


@triton.jit
def _finish(
    total,
    weight,
    position,
    stop,
    limit,
    first,
    pre_ptr,
    dpre_ptr,
    hidden_ptr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The elementwise part, in halves of halves: whole tiles of it would not fit the registers."""
    ROWS: tl.constexpr = total.shape[0]
    COLUMNS: tl.constexpr = total.shape[1]
    if CHUNKS > 1:
        left, right = total.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        share = _finish(
            left, weight, position, stop, limit, first,
            pre_ptr, dpre_ptr, hidden_ptr, HIDDEN, PARTS, ACTIVATION, CHUNKS // 2,
        )  # fmt: skip
        share += _finish(
            right, weight, position, stop, limit, first + COLUMNS // 2,
            pre_ptr, dpre_ptr, hidden_ptr, HIDDEN, PARTS, ACTIVATION, CHUNKS // 2,
        )  # fmt: skip
    else:
        unit = first + tl.arange(0, COLUMNS)
        real = (position < stop)[:, None] & (unit < HIDDEN)[None, :]
        written = (position < limit)[:, None] & (unit < HIDDEN)[None, :]
        out_type: tl.constexpr = dpre_ptr.dtype.element_ty
        wide = position.to(tl.int64)[:, None]
        pre_offset = wide * (PARTS * HIDDEN) + unit[None, :]
        gate = tl.load(pre_ptr + pre_offset, mask=real, other=0).to(tl.float32)
        active, slope = activate_with_slope(gate, ACTIVATION)
        dhidden = total
        dweighted = tl.where(real, total * weight[:, None], 0)
        if PARTS == 2:
            linear = tl.load(pre_ptr + pre_offset + HIDDEN, mask=real, other=0).to(tl.float32)
            hidden = active * linear
            dlinear = dweighted * active
            tl.store(dpre_ptr + pre_offset + HIDDEN, dlinear.to(out_type), mask=written)
            dgate = dweighted * linear * slope
        else:
            hidden = active
            dgate = dweighted * slope
        tl.store(dpre_ptr + pre_offset, dgate.to(out_type), mask=written)
        share = tl.sum(tl.where(real, dhidden * hidden, 0), axis=1)
        weighted = tl.where(real, hidden * weight[:, None], 0)
        hidden_offset = wide * HIDDEN + unit[None, :]
        tl.store(hidden_ptr + hidden_offset, weighted.to(out_type), mask=written)
    return share
