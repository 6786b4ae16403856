# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Load and summed probability, which balance losses are made of, in two launches and one back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.remembered import remembered

_CELLS = 4096  # scores that a program holds
_COUNTED = 2048  # choices that it counts at once
_ADDED = 16384  # parts' numbers that are held when they are added up
_MOST_PARTS = 128  # programs for a group of tokens
_TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32


@remembered
@triton.jit
def _sum_kernel(
    score,
    chosen,
    count_GPE,
    total_GPE,
    size,
    span,
    stride,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BINS: tl.constexpr,
):
    """Choices and summed probability per expert of ``span`` tokens of a group.

    Sums over tokens are taken once, at the end: each makes all warps wait.
    """
    group = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    bins = tl.arange(0, BINS)
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    count = tl.zeros((BINS,), tl.int32)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, size)
    for local in range(begin, end, BLOCK_T):
        within = local + tl.arange(0, BLOCK_T)
        t = group * size + within
        inside = (within < end)[:, None] & (e < E)[None, :]
        value = tl.load(score + t[:, None] * E + e[None, :], mask=inside, other=0.0)
        total += value / tl.maximum(tl.sum(value, axis=1), _TINY)[:, None]
    for local in range(begin, end, BLOCK_C):
        within = local + tl.arange(0, BLOCK_C)
        t = group * size + within
        wanted = (within < end)[:, None] & (k < K)[None, :]
        own = tl.load(chosen + t[:, None] * stride + k[None, :], mask=wanted, other=E)
        count += tl.histogram(tl.reshape(own.to(tl.int32), (BLOCK_C * BLOCK_K,)), BINS)
    part = (group * tl.num_programs(1) + tl.program_id(1)) * E
    tl.store(total_GPE + part + e, tl.sum(total, axis=0), mask=e < E)
    tl.store(count_GPE + part + bins, count, mask=bins < E)


@remembered
@triton.jit
def _product_kernel(
    count_GPE,
    total_GPE,
    fraction_GE,
    product_G,
    num_parts,
    size,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    count, total = _add_parts(count_GPE, total_GPE, group, num_parts, E, BLOCK_P, BLOCK_E)
    fraction = count.to(tl.float32) / size
    tl.store(fraction_GE + group * E + e, fraction, mask=e < E)
    tl.store(product_G + group, tl.sum(fraction * total, axis=0) / size)


@remembered
@triton.jit(do_not_specialize=["num_parts", "T"])
def _total_kernel(
    count_PE,
    total_PE,
    out,
    num_parts,
    T,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    count, total = _add_parts(count_PE, total_PE, 0, num_parts, E, BLOCK_P, BLOCK_E)
    tl.store(out + e, count.to(tl.float32), mask=e < E)
    tl.store(out + E + e, total, mask=e < E)
    tl.store(out + 2 * E, T.to(tl.float32))


@triton.jit
def _add_parts(
    count_GPE,
    total_GPE,
    group,
    num_parts,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros((BLOCK_P, BLOCK_E), tl.int32)
    total = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    for begin in range(0, num_parts, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        cell = (group * num_parts + part).to(tl.int64)[:, None] * E + e[None, :]
        inside = (part < num_parts)[:, None] & (e < E)[None, :]
        count += tl.load(count_GPE + cell, mask=inside, other=0)
        total += tl.load(total_GPE + cell, mask=inside, other=0.0)
    return tl.sum(count, axis=0), tl.sum(total, axis=0)


@remembered
@triton.jit
def _backward_kernel(
    score,
    fraction_GE,
    dproduct_G,
    dscore,
    size,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Groups and blocks share the grid's first axis: the others end at 65535.
    blocks = tl.cdiv(size, BLOCK_T)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    within = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (within < size)[:, None] & (e < E)[None, :]
    cell = (group * size + within)[:, None] * E + e[None, :]
    value = tl.load(score + cell, mask=inside, other=0.0)
    fraction = tl.load(fraction_GE + group * E + e, mask=e < E, other=0.0)[None, :]
    total = tl.sum(value, axis=1)
    floor = tl.maximum(total, _TINY)
    # Where the sum stands at its floor it is a constant.
    mean = tl.where(total > _TINY, tl.sum(value * fraction, axis=1) / floor, 0.0)
    slope = tl.load(dproduct_G + group) / size
    tl.store(dscore + cell, slope * (fraction - mean[:, None]) / floor[:, None], mask=inside)


def balance(score_TE: Tensor, chosen_TK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each group's product ``(G,)`` and the experts' share of choices ``(G, E)``."""
    count_GPE, total_GPE = _parts(score_TE, chosen_TK, size)
    groups, num_parts, E = count_GPE.shape
    product_G, fraction_GE = score_TE.new_empty(groups), score_TE.new_empty(groups, E)
    _product_kernel[(groups,)](
        count_GPE, total_GPE, fraction_GE, product_G, num_parts, size, E, *_adding(E), num_warps=16
    )
    return product_G, fraction_GE


def sums(score_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    """Choices and summed probability of each expert, and the number of tokens: ``(2 E + 1,)``."""
    T, E = score_TE.shape
    count_GPE, total_GPE = _parts(score_TE, chosen_TK, T)
    out_X = score_TE.new_empty(2 * E + 1)
    _total_kernel[(1,)](
        count_GPE, total_GPE, out_X, count_GPE.shape[1], T, E, *_adding(E), num_warps=16
    )
    return out_X


def _parts(score_TE: Tensor, chosen_TK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """What each program found of its group's tokens, ``(groups, programs, E)``."""
    (T, E), K = score_TE.shape, chosen_TK.shape[1]
    groups, width = T // size, max(2, power_of_2(E))
    rows = max(1, _CELLS // width)
    span = rows * ceil_div(ceil_div(size, rows), _MOST_PARTS)
    num_parts = ceil_div(size, span)
    count_GPE = score_TE.new_empty(groups, num_parts, E, dtype=torch.int32)
    total_GPE = score_TE.new_empty(groups, num_parts, E)
    choices = power_of_2(K)
    _sum_kernel[(groups, num_parts)](
        score_TE, chosen_TK, count_GPE, total_GPE, size, span, chosen_TK.stride(0), E, K,
        rows, width, max(1, _COUNTED // choices), choices, power_of_2(E + 1), num_warps=8,
    )  # fmt: skip
    return count_GPE, total_GPE


def _adding(num_experts: int) -> tuple[int, int]:
    """Parts that are added at once, width of a row."""
    width = max(2, power_of_2(num_experts))
    return min(max(1, _ADDED // width), _MOST_PARTS), width


def balance_backward(
    score_TE: Tensor, fraction_GE: Tensor, dproduct_G: Tensor, size: int
) -> Tensor:
    """The gradient of the scores."""
    E = score_TE.shape[1]
    width = max(2, power_of_2(E))
    rows = max(1, _CELLS // width)
    dscore_TE = torch.empty_like(score_TE)
    _backward_kernel[(len(fraction_GE) * ceil_div(size, rows),)](
        score_TE, fraction_GE, dproduct_G, dscore_TE, size, E, rows, width, num_warps=8
    )
    return dscore_TE
