# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Scores, gates and load of a decision, and their gradient."""

import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.remembered import remembered
from expertmesh.kernels.router.cells import TINY, counts, cut, gate_of, softmax, total_of


@remembered
@triton.jit
def _gates_kernel(
    logits,
    chosen,
    score,
    gate,
    norm,
    narrow,
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
    """Scores, gates, logsumexp, narrow ids, and this program's choices per expert."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    logit = tl.load(logits + cell, mask=inside, other=0.0)
    value, peak, total = softmax(logit, (e < E)[None, :])
    tl.store(norm + t, peak + tl.log(total), mask=t < T)
    if SIGMOID:
        value = tl.sigmoid(logit)
    tl.store(score + cell, value, mask=inside)
    tl.debug_barrier()  # other threads of this program read the scores back
    choice = t[:, None] * K + k[None, :]
    wanted = (t < T)[:, None] & (k < K)[None, :]
    own = tl.load(chosen + choice, mask=wanted, other=E)
    tl.store(narrow + choice, own.to(tl.int16), mask=wanted)
    part = tl.load(score + t[:, None] * E + own, mask=own < E, other=0.0)
    tl.store(gate + choice, gate_of(part, scale, RENORMALIZE), mask=wanted)
    bins = tl.arange(0, BINS)
    hits = tl.histogram(tl.reshape(own.to(tl.int32), (BLOCK_T * BLOCK_K,)), BINS)
    tl.store(count + block * E + bins, hits.to(tl.int64), mask=bins < E)


@triton.jit
def _add_parts(parts, place, mask, other, E: tl.constexpr, PARTS: tl.constexpr):
    """Logits from the parts that they are the sum of, which stand E apart."""
    total = tl.load(parts + place, mask=mask, other=other)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + place + part * E, mask=mask, other=0.0)
    return total


@remembered
@triton.jit
def _gates_backward_kernel(
    parts,
    narrow,
    dscore,
    dgate,
    dnorm,
    dlogits,
    T,
    stride,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_DSCORE: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    HAS_DNORM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the logits from that of scores, gates and logsumexp, in one pass."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    row = t[:, None] * (PARTS * E)
    logit = _add_parts(parts, row + e[None, :], inside, 0.0, E, PARTS)
    share, peak, total = softmax(logit, (e < E)[None, :])
    value = tl.sigmoid(logit) if SIGMOID else share
    slope = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if HAS_DSCORE:
        slope = tl.load(dscore + t[:, None] * stride + e[None, :], mask=inside, other=0.0)
    rise = tl.zeros((BLOCK_T,), tl.float32)
    if HAS_DNORM:
        rise = tl.load(dnorm + t, mask=t < T, other=0.0)
    shared = tl.sum(slope * value, axis=1)  # what the softmax takes from every logit of a row
    if HAS_DGATE:
        k = tl.arange(0, BLOCK_K)
        choice = t[:, None] * K + k[None, :]
        wanted = (t < T)[:, None] & (k < K)[None, :]
        own = tl.load(narrow + choice, mask=wanted, other=E).to(tl.int64)
        place = t[:, None] * E + own
        logit = _add_parts(parts, row + own, own < E, float("-inf"), E, PARTS)
        part_share = tl.exp(logit - peak[:, None]) / total[:, None]
        part = tl.sigmoid(logit) if SIGMOID else part_share
        grad = scale * tl.load(dgate + choice, mask=wanted, other=0.0)
        if RENORMALIZE:
            gates = tl.sum(part, axis=1)[:, None]
            floor = tl.maximum(gates, TINY)
            taken = tl.where(gates > TINY, tl.sum(grad * part, axis=1)[:, None] / floor, 0.0)
            grad = tl.where(own < E, (grad - taken) / floor, 0.0)
        shared += tl.sum(grad * part, axis=1)
    out = _through_score(value, share, slope, shared, rise, SIGMOID)
    tl.store(dlogits + cell, out, mask=inside)
    if HAS_DGATE:
        tl.debug_barrier()  # the chosen are written again, by other threads of this program
        if HAS_DSCORE:
            grad += tl.load(dscore + t[:, None] * stride + own, mask=own < E, other=0.0)
        out = _through_score(part, part_share, grad, shared, rise, SIGMOID)
        tl.store(dlogits + place, out, mask=own < E)


@triton.jit
def _through_score(value, share, slope, shared, rise, SIGMOID: tl.constexpr):
    inner = slope * (1.0 - value) if SIGMOID else slope - shared[:, None]
    return value * inner + share * rise[:, None]


def gates(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    score_TE: Tensor,
    gate_TK: Tensor,
    norm_T: Tensor,
    narrow_TK: Tensor,
) -> Tensor:
    """Write scores, gates, norms and ids; returns the choices per expert, int64 ``(E,)``."""
    (T, E), K = logits_TE.shape, chosen_TK.shape[1]
    rows, width, warps = cut(T, E)
    count_PE = counts(logits_TE)
    _gates_kernel[(len(count_PE),)](
        logits_TE,
        chosen_TK,
        score_TE,
        gate_TK,
        norm_T,
        narrow_TK,
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
    return total_of(count_PE)


def gates_backward(
    parts_TPE: Tensor,
    narrow_TK: Tensor,
    dscore_TE: Tensor | None,
    dgate_TK: Tensor | None,
    dnorm_T: Tensor | None,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    dlogits_TE: Tensor,
) -> None:
    """Write the gradient of the logits; rows of ``dscore_TE`` may be one and the same."""
    (T, P, E), K = parts_TPE.shape, narrow_TK.shape[1]
    rows, width, warps = cut(T, E)
    _gates_backward_kernel[(ceil_div(T, rows),)](
        parts_TPE,
        narrow_TK,
        dscore_TE,
        dgate_TK,
        dnorm_T,
        dlogits_TE,
        T,
        0 if dscore_TE is None else dscore_TE.stride(0),
        scale,
        E,
        K,
        sigmoid,
        renormalize,
        dscore_TE is not None,
        dgate_TK is not None,
        dnorm_T is not None,
        P,
        rows,
        width,
        power_of_2(K),
        num_warps=warps,
    )
