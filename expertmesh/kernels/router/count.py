# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""A layer's routing counters: in one launch for few tokens, else in two."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.dependent import options, wait
from expertmesh.kernels.remembered import remembered
from expertmesh.kernels.router.cells import prefetch

_CELLS = 4096  # logits that a program holds
_FEW_CELLS = 16384  # of them all, up to which one program does everything
_ROWS = tl.constexpr(512)  # programs' counts that are added up at once


@remembered
@triton.jit
def _one_program_kernel(
    logits,
    chosen,
    dropped,
    load,
    load_total,
    choices_total,
    dropped_total,
    tokens_total,
    entropy_total,
    max_logit,
    T,
    length,
    E: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        prefetch(logits, 0, BLOCK_T * BLOCK_E, T * E)
        prefetch(chosen, 0, BLOCK_T * BLOCK_K, T * K)
        prefetch(load, 0, BLOCK_E, E)
        prefetch(load_total, 0, BLOCK_E, E)
        prefetch(choices_total, 0, BINS, BINS)
        prefetch(dropped_total, 0, BINS, BINS)
        prefetch(tokens_total, 0, 1, 1)
        prefetch(entropy_total, 0, 1, 1)
        prefetch(max_logit, 0, 1, 1)
    wait(PDL)
    # Everything is fetched before anything is written: one wait for memory, not three.
    e = tl.arange(0, BLOCK_E)
    bins = tl.arange(0, BINS)
    all_load = tl.load(load_total + e, mask=e < E, other=0) + tl.load(load + e, mask=e < E, other=0)
    all_tokens = tl.load(tokens_total) + T
    all_made, all_lost = tl.load(choices_total + bins), tl.load(dropped_total + bins)
    all_entropy, all_peak = tl.load(entropy_total), tl.load(max_logit)
    made, lost, entropy, peak = _statistics(
        logits, chosen, dropped, 0, T, length, E, K, BINS, BLOCK_T, BLOCK_E, BLOCK_K
    )
    tl.store(load_total + e, all_load, mask=e < E)
    tl.store(tokens_total, all_tokens)
    tl.store(choices_total + bins, all_made + made)
    tl.store(dropped_total + bins, all_lost + lost)
    tl.store(entropy_total, all_entropy + entropy)
    tl.store(max_logit, tl.maximum(all_peak, peak))


@remembered
@triton.jit
def _part_kernel(
    logits,
    chosen,
    dropped,
    count_P2B,
    value_P2,
    T,
    length,
    E: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block = tl.program_id(0)
    made, lost, entropy, peak = _statistics(
        logits, chosen, dropped, block * BLOCK_T, T, length, E, K, BINS, BLOCK_T, BLOCK_E, BLOCK_K
    )
    bins = tl.arange(0, BINS)
    tl.store(count_P2B + block * (2 * BINS) + bins, made)
    tl.store(count_P2B + block * (2 * BINS) + BINS + bins, lost)
    tl.store(value_P2 + block * 2, entropy)
    tl.store(value_P2 + block * 2 + 1, peak)


@remembered
@triton.jit
def _add_kernel(
    count_P2B,
    value_P2,
    load,
    load_total,
    choices_total,
    dropped_total,
    tokens_total,
    entropy_total,
    max_logit,
    num_parts,
    T,
    E: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    _add_load(load, load_total, tokens_total, T, E, BLOCK_E)
    bins = tl.arange(0, BINS)
    made = tl.zeros((_ROWS, BINS), tl.int64)
    lost = tl.zeros((_ROWS, BINS), tl.int64)
    entropy = tl.zeros((_ROWS,), tl.float32)
    peak = tl.zeros((_ROWS,), tl.float32)
    for begin in range(0, num_parts, _ROWS):
        part = begin + tl.arange(0, _ROWS)
        real = part < num_parts
        cell = part[:, None] * (2 * BINS) + bins[None, :]
        made += tl.load(count_P2B + cell, mask=real[:, None], other=0)
        lost += tl.load(count_P2B + cell + BINS, mask=real[:, None], other=0)
        entropy += tl.load(value_P2 + part * 2, mask=real, other=0.0)
        peak = tl.maximum(peak, tl.load(value_P2 + part * 2 + 1, mask=real, other=0.0))
    tl.store(choices_total + bins, tl.load(choices_total + bins) + tl.sum(made, axis=0))
    tl.store(dropped_total + bins, tl.load(dropped_total + bins) + tl.sum(lost, axis=0))
    tl.store(entropy_total, tl.load(entropy_total) + tl.sum(entropy, axis=0))
    tl.store(max_logit, tl.maximum(tl.load(max_logit), tl.max(peak, axis=0)))


@triton.jit
def _add_load(load, load_total, tokens_total, T, E: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.arange(0, BLOCK_E)
    known = tl.load(load_total + e, mask=e < E, other=0)
    tl.store(load_total + e, known + tl.load(load + e, mask=e < E, other=0), mask=e < E)
    tl.store(tokens_total, tl.load(tokens_total) + T)


@triton.jit
def _statistics(
    logits,
    chosen,
    dropped,
    first,
    T,
    length,
    E: tl.constexpr,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of BLOCK_T tokens: choices and drops by position, summed entropy, largest logit."""
    t = first + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    choice = t.to(tl.int64)[:, None] * K + k[None, :]
    wanted = (t < T)[:, None] & (k < K)[None, :]
    own = tl.load(chosen + choice, mask=wanted, other=E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t.to(tl.int64)[:, None] * E + e[None, :]
    value = tl.load(logits + cell, mask=inside, other=0.0)
    bin_T = (t % length).to(tl.int64) * BINS // length
    here = bin_T[:, None] == tl.arange(0, BINS)[None, :]
    made_T1 = tl.sum((own < E).to(tl.int32), axis=1)[:, None]
    made = tl.sum(tl.where(here, made_T1, 0), axis=0)
    lost = tl.zeros((BINS,), tl.int32)
    if dropped is not None:
        lost_TK = tl.load(dropped + choice, mask=wanted, other=0) != 0
        lost_T1 = tl.sum(lost_TK.to(tl.int32), axis=1)[:, None]
        lost = tl.sum(tl.where(here, lost_T1, 0), axis=0)

    peak = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    shifted = value - tl.max(tl.where(inside, value, float("-inf")), axis=1)[:, None]
    shifted = tl.where(inside, shifted, 0.0)
    power = tl.where(inside, tl.exp(shifted), 0.0)
    total = tl.sum(power, axis=1)
    entropy = tl.log(total) - tl.sum(power * shifted, axis=1) / total
    entropy = tl.sum(tl.where(t < T, entropy, 0.0), axis=0)
    return made, lost, entropy, peak


def count(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    dropped_TK: Tensor | None,
    load_E: Tensor,
    counters: list[Tensor],
    length: int,
) -> None:
    """Add one pass to load, choices, dropped, tokens, entropy and max_logit, in this order."""
    (T, E), K = logits_TE.shape, chosen_TK.shape[1]
    given = (logits_TE, chosen_TK, dropped_TK)
    bins, width, choices = len(counters[1]), power_of_2(E), power_of_2(K)
    rows = power_of_2(T)
    if rows * width <= _FEW_CELLS:
        _one_program_kernel[(1,)](
            *given, load_E, *counters, T, length, E, K, bins, rows, width, choices,
            **options(logits_TE, min(16, max(1, rows * width // 512))),
        )  # fmt: skip
        return
    rows = max(1, _CELLS // width)
    num_parts = ceil_div(T, rows)
    count_P2B = load_E.new_empty(num_parts, 2, bins, dtype=torch.int32)
    value_P2 = logits_TE.new_empty(num_parts, 2)
    _part_kernel[(num_parts,)](
        *given, count_P2B, value_P2, T, length, E, K, bins, rows, width, choices, num_warps=8
    )
    _add_kernel[(1,)](
        count_P2B, value_P2, load_E, *counters, num_parts, T, E, bins, width, num_warps=16
    )
