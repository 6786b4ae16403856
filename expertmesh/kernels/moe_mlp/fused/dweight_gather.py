# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Gradients of the experts' matrices, whose rows further warps gather on the way (Gluon, Hopper).

Four warps gather rows by token and one fetches grouped rows through the copy engine, both into one
ring; two warpgroups share a tile and add up its products. What is gathered is copied nowhere else.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
    grouped_order,
    halves,
    sides,
)
from expertmesh.kernels.remembered import remembered

_SIDE = gl.constexpr(128)
"""Rows and columns that are stored together; a tile is two such squares."""


@remembered
@gluon.jit
def dweight_gather_kernel(
    rows_desc,
    gathered_ptr,
    order_ptr,
    offset_ptr,
    longest_ptr,
    out_ptr,
    stride_expert,
    stride_part,
    stride_row,
    NUM_EXPERTS: gl.constexpr,
    CHOICES: gl.constexpr,
    HEIGHT: gl.constexpr,
    PART: gl.constexpr,
    WIDTH: gl.constexpr,
    ROWS: gl.constexpr,
    COLUMNS: gl.constexpr,
    GATHER_LEFT: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """``out[e] = left^T right`` over the rows of expert ``e``; zeros where it has none.

    Experts with most rows come first: a program that ends late has then only short ones ahead.

    One of the two is ``rows_desc``, ``(N, .)``, grouped, zero behind the last expert's rows. The
    other, left if ``GATHER_LEFT``, is gathered, ``(R, .)`` by token; tiles divide its width.
    ``out``: ``(E, HEIGHT, WIDTH)``, its rows in parts of ``PART``, by strides.
    """
    dtype: gl.constexpr = rows_desc.dtype
    DEPTH: gl.constexpr = rows_desc.block_type.shape[0]
    wide: gl.constexpr = ROWS if GATHER_LEFT else COLUMNS
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([DEPTH, wide], dtype)
    gathered_smem = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, wide], swizzled)
    rows_smem = gl.allocate_shared_memory(
        dtype, [STAGES, DEPTH, rows_desc.block_type.shape[1]], rows_desc.layout
    )
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=1)
        mbarrier.init(full.index(stage), count=ARRIVALS)
    ring = (gathered_smem, rows_smem, empty, full)
    spans = (offset_ptr, longest_ptr)
    strides = (stride_expert, stride_part, stride_row)
    CUT: gl.constexpr = (NUM_EXPERTS, HEIGHT, WIDTH, ROWS, COLUMNS, GROUP)
    gl.warp_specialize(
        [
            (_add_up, (out_ptr, strides, spans, ring, PART, GATHER_LEFT, CUT)),
            (_gather, (gathered_ptr, order_ptr, spans, ring, CHOICES, GATHER_LEFT, CUT)),
            (_fetch, (rows_desc, spans, ring, GATHER_LEFT, CUT)),
        ],
        [GATHERING_WARPS, 1],
        [72, 24],
    )


@gluon.jit
def _num_tiles(CUT: gl.constexpr):
    num_experts: gl.constexpr = CUT[0]
    return num_experts * _across(CUT[1], CUT[3]) * _across(CUT[2], CUT[4])


@gluon.constexpr_function
def _across(size, tile):
    return (size + tile - 1) // tile


@gluon.jit
def _tile(index, spans, CUT: gl.constexpr):
    """Expert, row and column of a tile, first and last row of its sum."""
    offset_ptr, longest_ptr = spans
    num_rows: gl.constexpr = _across(CUT[1], CUT[3])
    num_columns: gl.constexpr = _across(CUT[2], CUT[4])
    expert = gl.load(longest_ptr + index // (num_rows * num_columns))
    within = index % (num_rows * num_columns)
    row, column = grouped_order(within, num_rows, num_columns, CUT[5])
    return expert, row, column, gl.load(offset_ptr + expert), gl.load(offset_ptr + expert + 1)


@gluon.jit
def _fetch(rows_desc, spans, ring, GATHER_LEFT: gl.constexpr, CUT: gl.constexpr):
    """Grouped rows, step by step. Behind the expert's come the next one's, which meet zeros: an
    infinite number among them would show in both experts' gradients.
    """
    _gathered, rows_smem, empty, full = ring
    STAGES: gl.constexpr = rows_smem.shape[0]
    DEPTH: gl.constexpr = rows_smem.shape[1]
    step = 0
    for index in range(gl.program_id(0), _num_tiles(CUT), gl.num_programs(0)):
        _expert, row, column, start, stop = _tile(index, spans, CUT)
        place = column if GATHER_LEFT else row
        for begin in range(start, stop, DEPTH):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, rows_desc.block_type.nbytes)
            corner = [begin, place * rows_smem.shape[2]]
            tma.async_copy_global_to_shared(rows_desc, corner, ready, rows_smem.index(stage))
            step += 1


@gluon.jit
def _gather(
    gathered_ptr,
    order_ptr,
    spans,
    ring,
    CHOICES: gl.constexpr,
    GATHER_LEFT: gl.constexpr,
    CUT: gl.constexpr,
):
    """Rows by token, step by step; zeros behind the expert's."""
    gathered_smem, _rows, empty, full = ring
    STAGES: gl.constexpr = gathered_smem.shape[0]
    DEPTH: gl.constexpr = gathered_smem.shape[1]
    WIDE: gl.constexpr = gathered_smem.shape[2]
    OUTER: gl.constexpr = CUT[1] if GATHER_LEFT else CUT[2]
    layout: gl.constexpr = gathering_layout(WIDE)
    line = gl.arange(0, DEPTH, layout=gl.SliceLayout(1, layout))
    unit = gl.arange(0, WIDE, layout=gl.SliceLayout(0, layout))
    step = 0
    for index in range(gl.program_id(0), _num_tiles(CUT), gl.num_programs(0)):
        _expert, row, column, start, stop = _tile(index, spans, CUT)
        corner = gathered_ptr + (row if GATHER_LEFT else column) * WIDE
        ahead = gl.load(order_ptr + start + line, mask=line < stop - start, other=0)
        for begin in range(start, stop, DEPTH):
            token = ahead // CHOICES
            rest = stop - begin
            # The next step's: nobody waits for them then.
            ahead = gl.load(order_ptr + (begin + DEPTH) + line, mask=line < rest - DEPTH, other=0)
            real = (line < rest)[:, None] & (unit >= 0)[None, :]
            source_ptrs = corner + (token.to(gl.int64) * OUTER)[:, None] + unit[None, :]
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            bring(source_ptrs, real, gathered_smem.index(stage), full.index(stage))
            step += 1


@gluon.jit
def _add_up(
    out_ptr,
    strides,
    spans,
    ring,
    PART: gl.constexpr,
    GATHER_LEFT: gl.constexpr,
    CUT: gl.constexpr,
):
    """Products in float32, stored by squares whose rows lie in few threads' hands."""
    gathered_smem, rows_smem, empty, full = ring
    stride_expert, stride_part, stride_row = strides
    STAGES: gl.constexpr = rows_smem.shape[0]
    DEPTH: gl.constexpr = rows_smem.shape[1]
    HEIGHT: gl.constexpr = CUT[1]
    WIDTH: gl.constexpr = CUT[2]
    ROWS: gl.constexpr = CUT[3]
    COLUMNS: gl.constexpr = CUT[4]
    left_smem = gathered_smem if GATHER_LEFT else rows_smem
    right_smem = rows_smem if GATHER_LEFT else gathered_smem
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, _SIDE, 16])
    stored: gl.constexpr = chunk_layout(2)
    line = gl.arange(0, _SIDE, layout=gl.SliceLayout(1, stored))
    unit = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, stored))
    step = 0
    for index in range(gl.program_id(0), _num_tiles(CUT), gl.num_programs(0)):
        expert, row, column, start, stop = _tile(index, spans, CUT)
        total = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
        for begin in range(start, stop, DEPTH):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            fence_async_shared()  # between the threads' copies and the tensor cores
            left = left_smem.index(stage).permute((1, 0))
            total = warpgroup_mma(left, right_smem.index(stage), total, is_async=True)
            total = warpgroup_mma_wait(1, deps=[total])
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=begin > start)
            step += 1
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=stop > start)

        result = total.to(out_ptr.dtype.element_ty)
        expert_ptr = out_ptr + expert.to(gl.int64) * stride_expert
        squares = halves(result) if ROWS > COLUMNS else sides(result)
        for square in gl.static_range(2):
            high = row * ROWS + line
            first = column * COLUMNS + unit
            if ROWS > COLUMNS:
                high += square * _SIDE
            else:
                first += square * _SIDE
            row_ptrs = expert_ptr + (high // PART) * stride_part + (high % PART) * stride_row
            pieces = chunks(squares[square])
            for piece in gl.static_range(4):
                wide = first + piece * CHUNK
                inside = (high < HEIGHT)[:, None] & (wide < WIDTH)[None, :]
                out = gl.convert_layout(pieces[piece], stored)
                gl.store(row_ptrs[:, None] + wide[None, :], out, mask=inside)
