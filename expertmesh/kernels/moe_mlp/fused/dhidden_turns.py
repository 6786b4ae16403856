# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Gradient of the pre-activation by specialised warps (Gluon, Hopper)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from expertmesh.kernels.moe_mlp.fused import activations
from expertmesh.kernels.moe_mlp.fused.gathering import (
    ARRIVALS,
    GATHERING_WARPS,
    bring,
    gathering_layout,
)
from expertmesh.kernels.moe_mlp.fused.turns import (
    CHUNK,
    chunk_layout,
    chunks,
    fetch,
    grouped_order,
    halves,
    make_ring,
    product,
    row_tile,
)
from expertmesh.kernels.remembered import remembered

_any_activation = gluon.jit(activations.activate_with_slope.fn)
_LOG2_E = gl.constexpr(1.4426950408889634)


@remembered
@gluon.jit
def dhidden_turns_kernel(
    dy,
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
    NUM_EXPERTS: gl.constexpr,
    WIDTH: gl.constexpr,
    HIDDEN: gl.constexpr,
    PARTS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CHOICES: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """As ``dhidden_kernel``.

    ``dy``: a pointer to ``(R, D)`` by token, gathered on the way; or with ``CHOICES`` of 0 a
    descriptor of grouped rows, ``(N, D)``, in blocks of ``ROWS``. ``down_desc``: ``(E D, F)``.
    """
    GATHERED: gl.constexpr = CHOICES > 0
    DEPTH: gl.constexpr = down_desc.block_type.shape[0]
    ring = make_ring(down_desc, ROWS, DEPTH, STAGES, ARRIVALS if GATHERED else 1)
    num_rows = gl.load(num_tiles_ptr)
    num_valid = gl.load(offset_ptr + NUM_EXPERTS)
    tables = (order_ptr, tile_ptr, num_rows, num_valid, num_assignments)
    outputs = (pre_ptr, dpre_ptr, hidden_ptr, share_ptr)
    fixed: gl.constexpr = (WIDTH, HIDDEN, PARTS, ACTIVATION, GATHERED, GROUP)
    sizes: gl.constexpr = (WIDTH, HIDDEN, False, GATHERED, GROUP)
    if GATHERED:
        gl.warp_specialize(
            [
                (_multiply, (combine_ptr, tables, outputs, ring, fixed, 0)),
                (_multiply, (combine_ptr, tables, outputs, ring, fixed, 1)),
                (_gather, (dy, order_ptr, tile_ptr, num_rows, ring, CHOICES, fixed)),
                (fetch, (dy, down_desc, tile_ptr, num_rows, ring, sizes)),
            ],
            [4, GATHERING_WARPS, 1],
            [208, 72, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (combine_ptr, tables, outputs, ring, fixed, 0)),
                (_multiply, (combine_ptr, tables, outputs, ring, fixed, 1)),
                (fetch, (dy, down_desc, tile_ptr, num_rows, ring, sizes)),
            ],
            [4, 1],
            [232, 40],
        )


@gluon.jit
def _gather(
    dy_ptr,
    order_ptr,
    tile_ptr,
    num_rows,
    ring,
    CHOICES: gl.constexpr,
    FIXED: gl.constexpr,
):
    """Rows by token of every tile, step by step; behind the expert's its last again."""
    WIDTH: gl.constexpr = FIXED[0]
    GROUP: gl.constexpr = FIXED[5]
    rows_smem, weight_smem, empty, full, _turns = ring
    STAGES: gl.constexpr = rows_smem.shape[0]
    ROWS: gl.constexpr = rows_smem.shape[1]
    DEPTH: gl.constexpr = rows_smem.shape[2]
    num_columns: gl.constexpr = FIXED[1] // weight_smem.shape[2]
    layout: gl.constexpr = gathering_layout(DEPTH)
    line = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    unit = gl.arange(0, DEPTH, layout=gl.SliceLayout(0, layout))
    step = 0
    for index in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, _column = grouped_order(index, num_rows, num_columns, GROUP)
        _expert, start, stop = row_tile(tile_ptr, row)
        token = gl.load(order_ptr + gl.minimum(start + line, stop - 1)) // CHOICES
        source_ptrs = dy_ptr + (token.to(gl.int64) * WIDTH)[:, None] + unit[None, :]
        for begin in range(0, WIDTH, DEPTH):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bring(source_ptrs + begin, None, rows_smem.index(stage), full.index(stage))
            step += 1


@gluon.jit
def _multiply(
    combine_ptr,
    tables,
    outputs,
    ring,
    FIXED: gl.constexpr,
    TURN: gl.constexpr,
):
    WIDTH: gl.constexpr = FIXED[0]
    HIDDEN: gl.constexpr = FIXED[1]
    PARTS: gl.constexpr = FIXED[2]
    ACTIVATION: gl.constexpr = FIXED[3]
    GATHERED: gl.constexpr = FIXED[4]
    GROUP: gl.constexpr = FIXED[5]
    order_ptr, tile_ptr, num_rows, num_valid, num_assignments = tables
    pre_ptr, dpre_ptr, hidden_ptr, share_ptr = outputs
    ROWS: gl.constexpr = ring[0].shape[1]
    DEPTH: gl.constexpr = ring[0].shape[2]
    COLUMNS: gl.constexpr = ring[1].shape[2]
    num_columns: gl.constexpr = HIDDEN // COLUMNS
    layout: gl.constexpr = chunk_layout()
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    tile = TURN
    first = gl.program_id(0) + TURN * gl.num_programs(0)
    for index in range(first, num_rows * num_columns, 2 * gl.num_programs(0)):
        row, column = grouped_order(index, num_rows, num_columns, GROUP)
        _expert, start, stop = row_tile(tile_ptr, row)
        limit = gl.where(stop == num_valid, gl.minimum(start + ROWS, num_assignments), stop)
        # Fetched while the product is computed: who takes turns has nobody else to wait for.
        upper = start + line
        lower = upper + 64
        upper_weight = _weights(combine_ptr, order_ptr, upper, stop)
        lower_weight = _weights(combine_ptr, order_ptr, lower, stop)
        gate, linear = _load(pre_ptr, line, start, stop, column * COLUMNS, layout, HIDDEN, PARTS)
        sides = halves(product(ring, tile, WIDTH // DEPTH, False, GATHERED, TURN))
        tile += 2
        for side in gl.static_range(2):
            top = start + side * 64
            weight = lower_weight if side == 1 else upper_weight
            share = gl.zeros((64,), gl.float32, gl.SliceLayout(1, layout))
            pieces = chunks(sides[side])
            for piece in gl.static_range(4):
                at = column * COLUMNS + piece * CHUNK
                next_gate, next_linear = gate, linear
                if piece < 3:
                    next_gate, next_linear = _load(
                        pre_ptr, line, top, stop, at + CHUNK, layout, HIDDEN, PARTS
                    )
                elif side == 0:
                    next_gate, next_linear = _load(
                        pre_ptr, line, top + 64, stop, column * COLUMNS, layout, HIDDEN, PARTS
                    )
                dhidden = gl.convert_layout(pieces[piece], layout)
                share += _finish(
                    dhidden, gate, linear, weight, line, top, stop, limit, at, dpre_ptr,
                    hidden_ptr, HIDDEN, PARTS, ACTIVATION,
                )  # fmt: skip
                gate, linear = next_gate, next_linear
            share_ptrs = share_ptr + (top + line).to(gl.int64) * num_columns + column
            gl.store(share_ptrs, share, mask=top + line < stop)


@gluon.jit
def _weights(combine_ptr, order_ptr, position, stop):
    assignment = gl.load(order_ptr + gl.minimum(position, stop - 1))
    return gl.load(combine_ptr + assignment).to(gl.float32)


@gluon.jit
def _load(
    pre_ptr,
    line,
    top,
    stop,
    at,
    layout: gl.constexpr,
    HIDDEN: gl.constexpr,
    PARTS: gl.constexpr,
):
    """A chunk of the pre-activation, gate and linear half; 0 behind the expert's rows."""
    unit = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    real = (line < stop - top)[:, None] & (unit >= 0)[None, :]
    offset = line[:, None] * (PARTS * HIDDEN) + unit[None, :]
    pre_ptrs = pre_ptr + (top.to(gl.int64) * (PARTS * HIDDEN) + at) + offset
    gate = gl.load(pre_ptrs, mask=real, other=0)
    linear = gate
    if PARTS == 2:
        linear = gl.load(pre_ptrs + HIDDEN, mask=real, other=0)
    return gate, linear


@gluon.jit
def _finish(
    dhidden,
    gate,
    linear,
    weight,
    line,
    top,
    stop,
    limit,
    at,
    dpre_ptr,
    hidden_ptr,
    HIDDEN: gl.constexpr,
    PARTS: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """The elementwise part of one chunk; its share of the weights' gradient."""
    out_type: gl.constexpr = dpre_ptr.dtype.element_ty
    layout: gl.constexpr = chunk_layout()
    unit = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    real = (line < stop - top)[:, None] & (unit >= 0)[None, :]
    written = (line < limit - top)[:, None] & (unit >= 0)[None, :]
    corner = top.to(gl.int64) * HIDDEN
    offset = line[:, None] * (PARTS * HIDDEN) + unit[None, :]
    dpre_ptrs = dpre_ptr + (corner * PARTS + at) + offset
    # Rows behind the expert's are another's, or anything.
    dhidden = gl.where(real, dhidden, 0.0)
    dweighted = dhidden * weight[:, None]
    hidden, slope = _activate_with_slope(gate.to(gl.float32), ACTIVATION)
    dgate = dweighted * slope
    if PARTS == 2:
        gl.store(dpre_ptrs + HIDDEN, (dweighted * hidden).to(out_type), mask=written)
        hidden = hidden * linear.to(gl.float32)
        dgate = dgate * linear.to(gl.float32)
    gl.store(dpre_ptrs, dgate.to(out_type), mask=written)
    hidden_ptrs = hidden_ptr + (corner + at) + (line[:, None] * HIDDEN + unit[None, :])
    gl.store(hidden_ptrs, (hidden * weight[:, None]).to(out_type), mask=written)
    return gl.sum(dhidden * hidden, axis=1)


@gluon.jit
def _activate_with_slope(x, NAME: gl.constexpr):
    """As in ``activations``, with the hardware's own exponential and reciprocal for SiLU."""
    if NAME == "silu":
        share = _reciprocal(1 + _exp2(x * -_LOG2_E))
        y = x * share
        slope = share + y * (1 - share)
    else:
        y, slope = _any_activation(x, NAME)
    return y, slope


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )
