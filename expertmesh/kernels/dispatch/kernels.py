# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""One launch for each of ``op``'s functions, three for ``places``.

Weights are float32 and are moved as the int32 numbers of the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.dispatch.reference import Places
from expertmesh.kernels.layout import make_layout
from expertmesh.kernels.remembered import remembered
from expertmesh.kernels.triton_support import on_its_device

_CELLS = 1024  # numbers that a program holds
_TILE_ROWS = 1 << 20  # tiles are not read: as few as can be
_WORD = torch.int32


@on_its_device
def destinations(expert_TK: Tensor, num_local: int, ep: int, etp: int) -> Tensor:
    """See ``op.destinations``; at least one token and one choice."""
    T, K = expert_TK.shape
    out_TJ = expert_TK.new_empty(T, min(ep, K) * etp, dtype=torch.int64)
    kernel = _ranks_kernel if ep <= K else _choices_kernel
    width = power_of_2(ep * etp if ep <= K else K)
    rows = max(1, _CELLS // width)
    kernel[(ceil_div(T, rows),)](
        expert_TK.contiguous(), out_TJ, T, num_local, ep, etp, K, rows, width
    )
    return out_TJ


@on_its_device
def places(rank_TJ: Tensor, num_ranks: int) -> Places:
    """See ``op.places``; at least one destination."""
    layout = make_layout(rank_TJ, num_ranks, _TILE_ROWS)
    token_N = layout.order_N // rank_TJ.shape[1]
    return Places(token_N, layout.inverse_N.view(rank_TJ.shape), layout.offset_E1)


@on_its_device
def pack_choices(
    expert_TK: Tensor, weight_TK: Tensor, token_N: Tensor, empty_N: Tensor | None, sentinel: int
) -> Tensor:
    """See ``op.pack_choices``; at least one token, one choice and one row."""
    N, K = len(token_N), expert_TK.shape[1]
    out_NB = expert_TK.new_empty(N, 2 * K * _WORD.itemsize, dtype=torch.uint8)
    width = power_of_2(K)
    rows = max(1, _CELLS // width)
    _pack_kernel[(ceil_div(N, rows),)](
        expert_TK.contiguous(),
        weight_TK.contiguous().view(_WORD),
        token_N,
        token_N if empty_N is None else empty_N.view(torch.uint8),
        out_NB.view(_WORD),
        N,
        sentinel,
        K,
        empty_N is not None,
        rows,
        width,
    )
    return out_NB


@on_its_device
def unpack_choices(choice_RB: Tensor, first: int, num_local: int) -> tuple[Tensor, Tensor]:
    """See ``op.unpack_choices``; at least one row and one choice."""
    R, K = len(choice_RB), choice_RB.shape[1] // (2 * _WORD.itemsize)
    id_RK = choice_RB.new_empty(R, K, dtype=torch.int64)
    weight_RK = choice_RB.new_empty(R, K, dtype=torch.float32)
    width = power_of_2(K)
    rows = max(1, _CELLS // width)
    _unpack_kernel[(ceil_div(R, rows),)](
        choice_RB.view(_WORD), id_RK, weight_RK.view(_WORD), R, first, num_local, K, rows, width
    )
    return id_RK, weight_RK


@on_its_device
def mask_others(value_RK: Tensor, id_RK: Tensor, num_local: int) -> Tensor:
    """See ``op.mask_others``; at least one number."""
    out_RK = torch.empty_like(value_RK, memory_format=torch.contiguous_format)
    size = out_RK.numel()
    _mask_kernel[(ceil_div(size, _CELLS),)](
        value_RK.contiguous().view(_WORD),
        id_RK.contiguous(),
        out_RK.view(_WORD),
        size,
        num_local,
        _CELLS,
    )
    return out_RK


@triton.jit
def _owners(expert_ptrs, mask, NUM_LOCAL: tl.constexpr, EP: tl.constexpr):
    """In whose span the experts are; ``EP`` for no expert."""
    return tl.load(expert_ptrs, mask=mask, other=NUM_LOCAL * EP).to(tl.int32) // NUM_LOCAL


@remembered
@triton.jit(do_not_specialize=["num_tokens"])
def _ranks_kernel(
    expert_ptr,
    out_ptr,
    num_tokens,
    NUM_LOCAL: tl.constexpr,
    EP: tl.constexpr,
    ETP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """For each token and rank, whether one of the token's experts is there."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = token < num_tokens
    rank = tl.arange(0, BLOCK_P)
    goes = tl.zeros((BLOCK_T, BLOCK_P), tl.int32)
    for choice in range(K):
        owner = _owners(expert_ptr + token * K + choice, inside, NUM_LOCAL, EP)
        goes |= (owner[:, None] == (rank // ETP)[None, :]).to(tl.int32)
    out = tl.where(goes != 0, rank[None, :], EP * ETP)
    cell = token[:, None] * (EP * ETP) + rank[None, :]
    tl.store(out_ptr + cell, out, mask=inside[:, None] & (rank < EP * ETP)[None, :])


@remembered
@triton.jit(do_not_specialize=["num_tokens"])
def _choices_kernel(
    expert_ptr,
    out_ptr,
    num_tokens,
    NUM_LOCAL: tl.constexpr,
    EP: tl.constexpr,
    ETP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """For each token and choice, its ranks, unless an earlier choice named them."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = token < num_tokens
    choice = tl.arange(0, BLOCK_K)
    cell = token[:, None] * K + choice[None, :]
    mask = inside[:, None] & (choice < K)[None, :]
    owner = _owners(expert_ptr + cell, mask, NUM_LOCAL, EP)
    named = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for earlier in range(K):
        before = _owners(expert_ptr + token * K + earlier, inside, NUM_LOCAL, EP)
        named |= ((owner == before[:, None]) & (choice > earlier)[None, :]).to(tl.int32)
    owner = tl.where(named != 0, EP, owner)
    for part in range(ETP):
        rank = tl.minimum(owner * ETP + part, EP * ETP)
        tl.store(out_ptr + cell * ETP + part, rank, mask=mask)


@remembered
@triton.jit(do_not_specialize=["num_rows", "sentinel"])
def _pack_kernel(
    expert_ptr,
    weight_ptr,
    token_ptr,
    empty_ptr,
    out_ptr,
    num_rows,
    sentinel,
    K: tl.constexpr,
    HAS_EMPTY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    choice = tl.arange(0, BLOCK_K)
    inside = row < num_rows
    full = inside
    if HAS_EMPTY:
        full = inside & (tl.load(empty_ptr + row, mask=inside, other=1) == 0)
    token = tl.load(token_ptr + row, mask=full, other=0).to(tl.int64)
    known = full[:, None] & (choice < K)[None, :]
    source = token[:, None] * K + choice[None, :]
    expert = tl.load(expert_ptr + source, mask=known, other=0).to(tl.int32)
    expert = tl.where(known, expert, sentinel)
    weight = tl.load(weight_ptr + source, mask=known, other=0)
    mask = inside[:, None] & (choice < K)[None, :]
    cell = row[:, None] * (2 * K) + choice[None, :]
    tl.store(out_ptr + cell, expert, mask=mask)
    tl.store(out_ptr + cell + K, weight, mask=mask)


@remembered
@triton.jit(do_not_specialize=["num_rows", "first", "num_local"])
def _unpack_kernel(
    choice_ptr,
    id_ptr,
    weight_ptr,
    num_rows,
    first,
    num_local,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    choice = tl.arange(0, BLOCK_K)
    mask = (row < num_rows)[:, None] & (choice < K)[None, :]
    source = row[:, None] * (2 * K) + choice[None, :]
    own = tl.load(choice_ptr + source, mask=mask, other=0) - first
    weight = tl.load(choice_ptr + source + K, mask=mask, other=0)
    here = (own >= 0) & (own < num_local)
    cell = row[:, None] * K + choice[None, :]
    tl.store(id_ptr + cell, tl.where(here, own, num_local), mask=mask)
    tl.store(weight_ptr + cell, tl.where(here, weight, 0), mask=mask)


@remembered
@triton.jit(do_not_specialize=["size", "num_local"])
def _mask_kernel(value_ptr, id_ptr, out_ptr, size, num_local, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    here = inside & (tl.load(id_ptr + place, mask=inside, other=0) < num_local)
    tl.store(out_ptr + place, tl.load(value_ptr + place, mask=here, other=0), mask=inside)
