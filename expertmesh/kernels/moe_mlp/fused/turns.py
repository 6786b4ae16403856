# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Products of grouped rows by specialised warps (Gluon, Hopper).

One warp fetches steps into a ring through the copy engine. Two warpgroups take every second tile
each: while one multiplies, the other finishes the tile before, so that what stands behind a product
costs no time of the tensor cores.
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

from expertmesh.kernels.moe_mlp.fused import raster
from expertmesh.kernels.remembered import remembered

CHUNK = gl.constexpr(32)
"""Columns that are finished together."""

grouped_order = gluon.jit(raster.grouped_order.fn)
row_tile = gluon.jit(raster.row_tile.fn)


@gluon.jit
def fetch(
    rows_desc,
    weight_desc,
    tile_ptr,
    num_rows,
    ring,
    SIZES: gl.constexpr,
):
    """Operands of every tile of this program, step by step; if gathered, the weight alone.

    ``SIZES``: what is summed and the columns of a product, whether the weight is transposed and the
    rows are gathered, and the row tiles that sweep the columns together.
    """
    INNER: gl.constexpr = SIZES[0]
    OUTER: gl.constexpr = SIZES[1]
    TRANSPOSED: gl.constexpr = SIZES[2]
    GATHERED: gl.constexpr = SIZES[3]
    GROUP: gl.constexpr = SIZES[4]
    rows_smem, weight_smem, empty, full, _turns = ring
    STAGES: gl.constexpr = rows_smem.shape[0]
    DEPTH: gl.constexpr = rows_smem.shape[2]
    COLUMNS: gl.constexpr = weight_smem.shape[1] if TRANSPOSED else weight_smem.shape[2]
    num_columns: gl.constexpr = OUTER // COLUMNS
    rows_bytes: gl.constexpr = 0 if GATHERED else rows_desc.block_type.nbytes
    num_bytes: gl.constexpr = rows_bytes + weight_desc.block_type.nbytes
    step = 0
    for index in range(gl.program_id(0), num_rows * num_columns, gl.num_programs(0)):
        row, column = grouped_order(index, num_rows, num_columns, GROUP)
        expert, start, _stop = row_tile(tile_ptr, row)
        for begin in range(0, INNER, DEPTH):
            stage = step % STAGES
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, num_bytes)
            if not GATHERED:
                place = rows_smem.index(stage)
                tma.async_copy_global_to_shared(rows_desc, [start, begin], ready, place)
            if TRANSPOSED:
                corner = [expert * OUTER + column * COLUMNS, begin]
            else:
                corner = [expert * INNER + begin, column * COLUMNS]
            tma.async_copy_global_to_shared(weight_desc, corner, ready, weight_smem.index(stage))
            step += 1


@gluon.jit
def product(
    ring,
    tile,
    steps: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GATHERED: gl.constexpr,
    TURN: gl.constexpr,
):
    """The product of this program's ``tile``, which is one of ``TURN``'s, in float32.

    A barrier tells only whether its last phase is over, so nobody may wait who is further behind:
    a warpgroup begins when the other has seen all steps of the tile before.

    ``GATHERED``: whether threads copied the rows, which the tensor cores see behind a fence only.
    """
    rows_smem, weight_smem, empty, full, turns = ring
    STAGES: gl.constexpr = rows_smem.shape[0]
    ROWS: gl.constexpr = rows_smem.shape[1]
    COLUMNS: gl.constexpr = weight_smem.shape[1] if TRANSPOSED else weight_smem.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    total = gl.zeros((ROWS, COLUMNS), gl.float32, layout)
    step = tile * steps
    mbarrier.wait(turns.index(TURN), (tile // 2 & 1) ^ (1 - TURN))
    for inner in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if GATHERED:
            fence_async_shared()
        weight = weight_smem.index(stage)
        if TRANSPOSED:
            weight = weight.permute((1, 0))
        total = warpgroup_mma(rows_smem.index(stage), weight, total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=inner > 0)
        step += 1
    mbarrier.arrive(turns.index(1 - TURN))
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
    return total


@gluon.jit
def halves(tile):
    """The upper and the lower rows."""
    upper, lower = tile.reshape(2, tile.shape[0] // 2, tile.shape[1]).permute(1, 2, 0).split()
    return upper, lower


@gluon.jit
def sides(tile):
    """The left and the right columns."""
    left, right = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()
    return left, right


@gluon.jit
def chunks(half):
    """Four pieces of columns."""
    left, right = sides(half)
    a, b = sides(left)
    c, d = sides(right)
    return a, b, c, d


@gluon.constexpr_function
def chunk_layout(warpgroups=1):
    """64 x 32 numbers for each warpgroup: a thread has runs of eight out of two rows.

    Lanes exchange within their quad only, and a quad reads and writes 64 bytes of a row.
    """
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]][: 1 + warpgroups],
        block_bases=[],
        shape=[64 * warpgroups, 32],
    )


@gluon.jit
def make_ring(
    weight_desc,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """Shared memory of the ring and its barriers: empty, full, and whose turn it is.

    ``ARRIVALS``: how many threads say that a step is full; one speaks for the copy engine.
    """
    HIGH: gl.constexpr = weight_desc.block_type.shape[0]
    WIDE: gl.constexpr = weight_desc.block_type.shape[1]
    dtype: gl.constexpr = weight_desc.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DEPTH], dtype)
    rows_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], swizzled)
    weight_smem = gl.allocate_shared_memory(dtype, [STAGES, HIGH, WIDE], weight_desc.layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(empty.index(stage), count=1)
        mbarrier.init(full.index(stage), count=ARRIVALS)
    for turn in gl.static_range(2):
        mbarrier.init(turns.index(turn), count=1)
    return rows_smem, weight_smem, empty, full, turns


@gluon.jit
def _multiply(
    tile_ptr,
    num_rows,
    out_ptr,
    ring,
    INNER: gl.constexpr,
    OUTER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    GROUP: gl.constexpr,
    TURN: gl.constexpr,
):
    DEPTH: gl.constexpr = ring[0].shape[2]
    COLUMNS: gl.constexpr = ring[1].shape[1] if TRANSPOSED else ring[1].shape[2]
    num_columns: gl.constexpr = OUTER // COLUMNS
    layout: gl.constexpr = chunk_layout()
    line = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    unit = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, layout))
    offset = line[:, None] * OUTER + unit[None, :]
    tile = TURN
    first = gl.program_id(0) + TURN * gl.num_programs(0)
    for index in range(first, num_rows * num_columns, 2 * gl.num_programs(0)):
        total = product(ring, tile, INNER // DEPTH, TRANSPOSED, False, TURN)
        tile += 2
        row, column = grouped_order(index, num_rows, num_columns, GROUP)
        _expert, start, stop = row_tile(tile_ptr, row)
        parts = halves(total.to(out_ptr.dtype.element_ty))
        for part in gl.static_range(2):
            top = start + part * 64
            inside = (line < stop - top)[:, None] & (unit >= 0)[None, :]
            out_ptrs = out_ptr + (top.to(gl.int64) * OUTER + column * COLUMNS) + offset
            pieces = chunks(parts[part])
            for piece in gl.static_range(4):
                out = gl.convert_layout(pieces[piece], layout)
                gl.store(out_ptrs + piece * CHUNK, out, mask=inside)


@remembered
@gluon.jit
def rows_turns_kernel(
    rows_desc,
    weight_desc,
    tile_ptr,
    num_tiles_ptr,
    out_ptr,
    INNER: gl.constexpr,
    OUTER: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
):
    """As ``rows_kernel``; ``INNER`` over both parts, matrices of all experts one below the other.

    ``weight_desc``: ``(E INNER, OUTER)``, or with ``TRANSPOSED`` ``(E OUTER, INNER)``; blocks
    divide both.
    """
    ROWS: gl.constexpr = rows_desc.block_type.shape[0]
    DEPTH: gl.constexpr = rows_desc.block_type.shape[1]
    ring = make_ring(weight_desc, ROWS, DEPTH, STAGES, 1)
    num_rows = gl.load(num_tiles_ptr)
    sizes: gl.constexpr = (INNER, OUTER, TRANSPOSED, False, GROUP)
    gl.warp_specialize(
        [
            (_multiply, (tile_ptr, num_rows, out_ptr, ring, INNER, OUTER, TRANSPOSED, GROUP, 0)),
            (_multiply, (tile_ptr, num_rows, out_ptr, ring, INNER, OUTER, TRANSPOSED, GROUP, 1)),
            (fetch, (rows_desc, weight_desc, tile_ptr, num_rows, ring, sizes)),
        ],
        [4, 1],
        [232, 40],
    )
