# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Triton kernels of the router and their launches. Everything is float32 inside."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.triton_support import has_dependent_launch

_TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32
_LEAST = tl.constexpr(-(2**63))


@triton.jit
def _wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _few_logits_kernel(
    x,
    weight,
    logits,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of BLOCK_T tokens for BLOCK_E experts by fused multiply-add."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = weight + tl.minimum(e, E - 1).to(tl.int64)[:, None] * D
    _wait(PDL)
    for offset in tl.static_range(BLOCK_T):
        t = tl.program_id(1) * BLOCK_T + offset
        x_row = x + tl.minimum(t, T - 1).to(tl.int64) * D
        total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
        for start in tl.static_range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            value = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)
            part = tl.load(row + d[None, :], mask=d[None, :] < D, other=0.0).to(tl.float32)
            total += part * value[None, :]
        wanted = e < tl.where(t < T, E, 0)
        tl.store(logits + t.to(tl.int64) * E + e, tl.sum(total, axis=1), mask=wanted)


@triton.jit
def _split_kernel(
    source,
    parts,
    num,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
    group_stride,
    PATTERN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write numbers as bfloat16 parts whose sum they are; PATTERN names the part of each group.

    A float32 has 24 bits: the rounded number, the rounded rest, and the rest of that have 8 each.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(source + i, mask=i < num, other=0.0).to(tl.float32)
    high = rest.to(tl.bfloat16)
    rest -= high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    target = parts + i // COLUMNS * ROW + i % COLUMNS
    for group in tl.static_range(len(PATTERN)):
        part = high
        if PATTERN[group] == 1:
            part = middle
        elif PATTERN[group] == 2:
            part = low
        tl.store(target + group * group_stride, part, mask=i < num)


@triton.jit
def _scores(logits, inside, SIGMOID: tl.constexpr):
    if SIGMOID:
        score = tl.sigmoid(logits)
    else:
        logits = tl.where(inside, logits, float("-inf"))
        power = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        score = power / tl.sum(power, axis=1)[:, None]
    return score


@triton.jit
def _select_kernel(
    logits,
    chosen,
    score,
    gate,
    count,
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The K best of each row, one at a time; with GATES, also all that ``_gates_kernel`` writes."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    _wait(PDL)
    value = _scores(tl.load(logits + cell, mask=inside, other=0.0), (e < E)[None, :], SIGMOID)
    # A float32 and the reversed index in one integer that sorts as the pair does.
    bits = _ordered(value.to(tl.int32, bitcast=True))
    key = (bits.to(tl.int64) << 32) | (BLOCK_E - 1 - e)[None, :].to(tl.int64)
    key = tl.where((e < E)[None, :], key, _LEAST)
    best = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    for i in tl.static_range(K):
        top = tl.max(key, axis=1)
        key = tl.where(key == top[:, None], _LEAST, key)
        best = tl.where((k == i)[None, :], top[:, None], best)
    choice = t[:, None] * K + k[None, :]
    wanted = (t < T)[:, None] & (k < K)[None, :]
    tl.store(chosen + choice, BLOCK_E - 1 - (best & 0xFFFFFFFF), mask=wanted)
    if GATES:
        tl.store(score + cell, value, mask=inside)
        part = _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        part = tl.where(wanted, part, 0.0)
        tl.store(gate + choice, _gate(part, scale, RENORMALIZE), mask=wanted)
        hits = tl.sum((inside & (key == _LEAST)).to(tl.int32), axis=0)
        tl.store(count + block * E + e, hits.to(tl.int64), mask=e < E)


@triton.jit
def _ordered(bits):
    """A float32's bits as an integer that sorts as it does, or back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _gate(part, scale, RENORMALIZE: tl.constexpr):
    if RENORMALIZE:
        part = part / tl.maximum(tl.sum(part, axis=1), _TINY)[:, None]
    return scale * part


@triton.jit
def _gates_kernel(
    logits,
    chosen,
    score,
    gate,
    count,
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BINS: tl.constexpr,
):
    """Scores, gates, and how often each expert was chosen by the rows of this program."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    value = _scores(tl.load(logits + cell, mask=inside, other=0.0), (e < E)[None, :], SIGMOID)
    tl.store(score + cell, value, mask=inside)
    tl.debug_barrier()  # other threads of this program read the scores back
    choice = t[:, None] * K + k[None, :]
    wanted = (t < T)[:, None] & (k < K)[None, :]
    own = tl.load(chosen + choice, mask=wanted, other=E)
    part = tl.load(score + t[:, None] * E + own, mask=own < E, other=0.0)
    tl.store(gate + choice, _gate(part, scale, RENORMALIZE), mask=wanted)
    bins = tl.arange(0, BINS)
    hits = tl.histogram(tl.reshape(own.to(tl.int32), (BLOCK_T * BLOCK_K,)), BINS)
    tl.store(count + block * E + bins, hits.to(tl.int64), mask=bins < E)


@triton.jit
def _gates_backward_kernel(
    score,
    chosen,
    dscore,
    dgate,
    dlogits,
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_DSCORE: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the logits from that of scores and gates, in one pass."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    value = tl.load(score + cell, mask=inside, other=0.0)
    slope = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DSCORE:
        slope = tl.load(dscore + cell, mask=inside, other=0.0)
    shared = tl.sum(slope * value, axis=1)  # what the softmax takes from every logit of a row
    if HAS_DGATE:
        k = tl.arange(0, BLOCK_K)
        choice = t[:, None] * K + k[None, :]
        wanted = (t < T)[:, None] & (k < K)[None, :]
        own = tl.load(chosen + choice, mask=wanted, other=E)
        place = t[:, None] * E + own
        part = tl.load(score + place, mask=own < E, other=0.0)
        grad = scale * tl.load(dgate + choice, mask=wanted, other=0.0)
        if RENORMALIZE:
            total = tl.sum(part, axis=1)[:, None]
            floor = tl.maximum(total, _TINY)
            taken = tl.where(total > _TINY, tl.sum(grad * part, axis=1)[:, None] / floor, 0.0)
            grad = tl.where(own < E, (grad - taken) / floor, 0.0)
        shared += tl.sum(grad * part, axis=1)
    tl.store(dlogits + cell, _through_score(value, slope, shared, SIGMOID), mask=inside)
    if HAS_DGATE:
        tl.debug_barrier()  # the chosen are written again, by other threads of this program
        if HAS_DSCORE:
            grad += tl.load(dscore + place, mask=own < E, other=0.0)
        tl.store(dlogits + place, _through_score(part, grad, shared, SIGMOID), mask=own < E)


@triton.jit
def _through_score(value, slope, shared, SIGMOID: tl.constexpr):
    inner = slope * (1.0 - value) if SIGMOID else slope - shared[:, None]
    return value * inner


def few_logits(x_TD: Tensor, weight_ED: Tensor, logits_TE: Tensor) -> None:
    """Write ``x W^T`` for a number of tokens at which reading the weights is the work."""
    (T, D), E = x_TD.shape, len(weight_ED)
    experts, tokens = 4, 1 if T <= 16 else 4
    _few_logits_kernel[(ceil_div(E, experts), ceil_div(T, tokens))](
        x_TD,
        weight_ED,
        logits_TE,
        T,
        E,
        D,
        experts,
        tokens,
        min(2048, power_of_2(D)),
        **_options(x_TD, 4),
    )


def split(source: Tensor, pattern: tuple[int, ...], *, by_row: bool) -> Tensor:
    """Matrices of bfloat16 parts: 0 the rounded numbers, 1 the rounded rest, 2 the last rest.

    Args:
        source: ``(rows, columns)``.
        pattern: The parts wanted, in order.
        by_row: Whether the parts of a row stand side by side, ``(rows, parts columns)``; else
            one matrix below the other, ``(parts rows, columns)``.
    """
    rows, columns = source.shape
    parts = len(pattern)
    shape = (rows, parts * columns) if by_row else (parts * rows, columns)
    out = torch.empty(shape, dtype=torch.bfloat16, device=source.device)
    num, block = source.numel(), 1024
    _split_kernel[(ceil_div(num, block),)](
        source,
        out,
        num,
        columns,
        shape[1],
        columns if by_row else num,
        pattern,
        block,
        num_warps=4,
    )
    return out


def choose(logits_TE: Tensor, sigmoid: bool, chosen_TK: Tensor) -> None:
    """Write the k best."""
    _launch_select(logits_TE, chosen_TK, None, None, None, 1.0, sigmoid, False)


def select(
    logits_TE: Tensor,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    chosen_TK: Tensor,
    score_TE: Tensor,
    gate_TK: Tensor,
) -> Tensor:
    """Write the k best, scores and gates; returns the choices per expert, int64 ``(E,)``."""
    count_PE = _counts(logits_TE)
    _launch_select(logits_TE, chosen_TK, score_TE, gate_TK, count_PE, scale, sigmoid, renormalize)
    return _total(count_PE)


def _launch_select(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    score_TE: Tensor | None,
    gate_TK: Tensor | None,
    count_PE: Tensor | None,
    scale: float,
    sigmoid: bool,
    renormalize: bool,
) -> None:
    (T, E), K = logits_TE.shape, chosen_TK.shape[1]
    rows, width, warps = _cut(T, E)
    _select_kernel[(ceil_div(T, rows),)](
        logits_TE,
        chosen_TK,
        score_TE,
        gate_TK,
        count_PE,
        T,
        scale,
        E,
        K,
        sigmoid,
        renormalize,
        count_PE is not None,
        rows,
        width,
        power_of_2(K),
        **_options(logits_TE, warps),
    )


def gates(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    score_TE: Tensor,
    gate_TK: Tensor,
) -> Tensor:
    """Write scores and gates; returns the choices per expert, int64 ``(E,)``."""
    (T, E), K = logits_TE.shape, chosen_TK.shape[1]
    rows, width, warps = _cut(T, E)
    count_PE = _counts(logits_TE)
    _gates_kernel[(len(count_PE),)](
        logits_TE,
        chosen_TK,
        score_TE,
        gate_TK,
        count_PE,
        T,
        scale,
        E,
        K,
        sigmoid,
        renormalize,
        rows,
        width,
        power_of_2(K),
        power_of_2(E + 1),
        num_warps=warps,
    )
    return _total(count_PE)


def _counts(logits_TE: Tensor) -> Tensor:
    """Room for each program's choices per expert."""
    (T, E) = logits_TE.shape
    programs = ceil_div(T, _cut(T, E)[0])
    return torch.empty(programs, E, dtype=torch.int64, device=logits_TE.device)


def _total(count_PE: Tensor) -> Tensor:
    return count_PE[0] if len(count_PE) == 1 else count_PE.sum(0)


def gates_backward(
    score_TE: Tensor,
    chosen_TK: Tensor,
    dscore_TE: Tensor | None,
    dgate_TK: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    dlogits_TE: Tensor,
) -> None:
    """Write the gradient of the logits."""
    (T, E), K = score_TE.shape, chosen_TK.shape[1]
    rows, width, warps = _cut(T, E)
    _gates_backward_kernel[(ceil_div(T, rows),)](
        score_TE,
        chosen_TK,
        dscore_TE,
        dgate_TK,
        dlogits_TE,
        T,
        scale,
        E,
        K,
        sigmoid,
        renormalize,
        dscore_TE is not None,
        dgate_TK is not None,
        rows,
        width,
        power_of_2(K),
        num_warps=warps,
    )


def _cut(num_tokens: int, num_experts: int) -> tuple[int, int, int]:
    """Tokens of a program, width of a row, warps."""
    width = max(2, power_of_2(num_experts))
    rows = min(power_of_2(num_tokens), max(1, 4096 // width))
    return rows, width, min(16, max(1, rows * width // 512))


def _options(like: Tensor, warps: int) -> dict[str, Any]:
    dependent = has_dependent_launch(like.device)
    return {"PDL": dependent, "num_warps": warps} | ({"launch_pdl": True} if dependent else {})
