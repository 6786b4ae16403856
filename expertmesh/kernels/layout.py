# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Where each routed row goes, in three launches and without asking the device.

1. each block of assignments counts its experts;
2. the counts become first positions, spans, and an order of experts by length;
3. each block sorts its assignments and scatters them; the row tiles are listed.

Positions within an expert follow the order of assignments, so the same ids give the same layout,
and gathers walk forward through memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.remembered import remembered

_BLOCKS = (128, 1024)  # assignments a program counts and sorts, if few and if many

_TILES_PER_PROGRAM = 16
_CELLS = 8192  # of the table of counts that a program of step 2 holds at once
_OWN = 16  # experts whose positions it finds
_LONG = tl.constexpr(1 << 20)  # above any number of experts


class Layout(NamedTuple):
    """int32 tables of one routing; N assignments, E experts, P tiles at most.

    Attributes:
        order_N: Assignment ``row * K + choice`` at each grouped position; positions from
            ``offset_E1[-1]`` on are not written.
        inverse_N: Grouped position of each assignment, -1 for a sentinel's.
        offset_E1: Ends of the experts' spans behind a leading 0, ``(E + 1,)``.
        longest_E: Experts by number of rows, the longest first.
        tile_P3: Expert, first position, and end of the expert's positions, of each row tile,
            ``(P, 3)``. Tiles beyond ``num_tiles_1`` are not written.
        num_tiles_1: How many tiles there are, ``(1,)``.
    """

    order_N: Tensor
    inverse_N: Tensor
    offset_E1: Tensor
    longest_E: Tensor
    tile_P3: Tensor
    num_tiles_1: Tensor


def most_tiles(num_assignments: int, num_experts: int, tile_rows: int) -> int:
    """A bound on the number of row tiles that the host knows."""
    return ceil_div(num_assignments, tile_rows) + min(num_experts, num_assignments)


def empty_layout(like: Tensor, num_assignments: int, num_experts: int, tile_rows: int) -> Layout:
    """Unwritten tables on the device of ``like``."""

    def table(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=torch.int32)

    return Layout(
        table(num_assignments),
        table(num_assignments),
        table(num_experts + 1),
        table(num_experts),
        table(most_tiles(num_assignments, num_experts, tile_rows), 3),
        table(1),
    )


def make_layout(expert_RK: Tensor, num_experts: int, tile_rows: int) -> Layout:
    """Group assignments by expert.

    Args:
        expert_RK: Ids ``(R, K)``, at least one; ``num_experts`` is the sentinel.
        num_experts: E.
        tile_rows: Most rows of a tile.
    """
    expert_N = expert_RK.reshape(-1)
    num_assignments = expert_N.numel()
    layout = empty_layout(expert_N, num_assignments, num_experts, tile_rows)
    block = _BLOCKS[num_assignments >= 8 * _BLOCKS[1]]
    blocks = ceil_div(num_assignments, block)
    bins = power_of_2(num_experts + 1)
    count_BE = expert_N.new_empty(blocks, bins, dtype=torch.int32)
    ahead_BE, first_BE = torch.empty_like(count_BE), torch.empty_like(count_BE)
    tile_start_E = expert_N.new_empty(bins, dtype=torch.int32)
    _count[(blocks,)](
        expert_N, count_BE, ahead_BE, num_assignments, num_experts, bins, block, num_warps=4
    )
    own = min(_OWN, bins)
    _place[(bins // own + 1,)](
        count_BE,
        ahead_BE,
        first_BE,
        layout.offset_E1,
        layout.longest_E,
        tile_start_E,
        layout.num_tiles_1,
        blocks,
        num_experts,
        bins,
        own,
        max(bins, min(_CELLS, own * power_of_2(blocks))) // own,
        tile_rows,
        num_warps=8,
    )
    programs = max(blocks, ceil_div(layout.tile_P3.shape[0], _TILES_PER_PROGRAM))
    _scatter[(programs,)](
        expert_N,
        first_BE,
        tile_start_E,
        *layout,
        num_assignments,
        num_experts,
        bins,
        block,
        tile_rows,
        _TILES_PER_PROGRAM,
        num_warps=4,
    )
    return layout


@remembered
@triton.jit(do_not_specialize=["num_assignments"])
def _count(
    expert_ptr,
    count_ptr,
    ahead_ptr,
    num_assignments,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block's assignments of each expert, and those of experts before it."""
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_assignments
    expert = tl.load(expert_ptr + place, mask=inside, other=num_experts)
    expert = tl.minimum(expert, num_experts).to(tl.int32)
    count = tl.histogram(expert, BINS)
    cell = block * BINS + tl.arange(0, BINS)
    tl.store(count_ptr + cell, count)
    tl.store(ahead_ptr + cell, tl.cumsum(count, axis=0) - count)


@remembered
@triton.jit(do_not_specialize=["num_blocks"])
def _place(
    count_ptr,
    ahead_ptr,
    first_ptr,
    offset_ptr,
    longest_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    num_blocks,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """First positions of a program's own ``OWN`` experts; a last program lists the spans."""
    if tl.program_id(0) == BINS // OWN:
        _list_spans(
            count_ptr, offset_ptr, longest_ptr, tile_start_ptr, num_tiles_ptr,
            num_blocks, num_experts, BINS, CHUNK * OWN // BINS, TILE_ROWS,
        )  # fmt: skip
    else:
        _find_firsts(count_ptr, ahead_ptr, first_ptr, num_blocks, BINS, OWN, CHUNK)


@triton.jit
def _find_firsts(
    count_ptr,
    ahead_ptr,
    first_ptr,
    num_blocks,
    BINS: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    total = tl.zeros((OWN,), tl.int32)
    for begin in range(0, num_blocks, CHUNK):
        blocks = begin + tl.arange(0, CHUNK)
        cell = blocks[:, None] * BINS + own[None, :]
        inside = blocks[:, None] < num_blocks
        count = tl.load(count_ptr + cell, mask=inside, other=0)
        # A block sorts its assignments: what is ahead of an expert's there is taken off here, so
        # that the place after sorting can be added as it is.
        ahead = tl.load(ahead_ptr + cell, mask=inside, other=0)
        before = tl.cumsum(count, axis=0) - count + total[None, :]
        tl.store(first_ptr + cell, before - ahead, mask=inside)
        total += tl.sum(count, axis=0)


@triton.jit
def _list_spans(
    count_ptr,
    offset_ptr,
    longest_ptr,
    tile_start_ptr,
    num_tiles_ptr,
    num_blocks,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Where all experts' positions and tiles begin, and which are longest."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros((CHUNK, BINS), tl.int32)
    for begin in range(0, num_blocks, CHUNK):
        blocks = begin + tl.arange(0, CHUNK)
        cell = blocks[:, None] * BINS + bins[None, :]
        counts += tl.load(count_ptr + cell, mask=blocks[:, None] < num_blocks, other=0)
    total = tl.where(bins < num_experts, tl.sum(counts, axis=0), 0)
    end = tl.cumsum(total, axis=0)
    tl.store(offset_ptr + bins, end - total, mask=bins <= num_experts)
    tiles = (total + TILE_ROWS - 1) // TILE_ROWS
    tile_end = tl.cumsum(tiles, axis=0)
    tl.store(tile_start_ptr + bins, tile_end - tiles)
    tl.store(num_tiles_ptr, tl.sum(tiles, axis=0))
    # Ties go to the lower index; what lies beyond the experts has no rows and comes last.
    key = total.to(tl.int64) * _LONG + (_LONG - 1 - bins)
    expert = _LONG - 1 - tl.sort(key, descending=True) % _LONG
    tl.store(longest_ptr + bins, expert.to(tl.int32), mask=bins < num_experts)


@remembered
@triton.jit(do_not_specialize=["num_assignments"])
def _scatter(
    expert_ptr,
    first_ptr,
    tile_start_ptr,
    order_ptr,
    inverse_ptr,
    offset_ptr,
    longest_ptr,
    tile_ptr,
    num_tiles_ptr,
    num_assignments,
    num_experts: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    block = tl.program_id(0)
    if block * BLOCK < num_assignments:
        local = tl.arange(0, BLOCK)
        place = block * BLOCK + local
        inside = place < num_assignments
        expert = tl.load(expert_ptr + place, mask=inside, other=num_experts)
        expert = tl.minimum(expert, num_experts).to(tl.int32)
        tl.store(inverse_ptr + place, -1, mask=inside & (expert >= num_experts))
        key = tl.sort(expert * BLOCK + local)
        expert = key // BLOCK
        place = block * BLOCK + key % BLOCK
        valid = expert < num_experts
        first = tl.load(first_ptr + block * BINS + expert, mask=valid, other=0)
        position = tl.load(offset_ptr + expert, mask=valid, other=0) + first + local
        tl.store(order_ptr + position, place, mask=valid)
        tl.store(inverse_ptr + place, position, mask=valid)

    tile = block * TILES + tl.arange(0, TILES)
    bins = tl.arange(0, BINS)
    start = tl.load(tile_start_ptr + bins)
    # The last expert that starts at or before a tile: of those that share a start, only it has
    # tiles. Entries beyond the experts start where the tiles end.
    expert = tl.sum((start[None, :] <= tile[:, None]).to(tl.int32), axis=1) - 1
    real = tile < tl.load(num_tiles_ptr)
    expert = tl.where(real, expert, 0)
    within = tile - tl.load(tile_start_ptr + expert)
    begin = tl.load(offset_ptr + expert) + within * TILE_ROWS
    tl.store(tile_ptr + tile * 3, expert, mask=real)
    tl.store(tile_ptr + tile * 3 + 1, begin, mask=real)
    tl.store(tile_ptr + tile * 3 + 2, tl.load(offset_ptr + expert + 1), mask=real)
