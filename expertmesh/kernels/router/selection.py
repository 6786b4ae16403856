# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""The k best of each token, and with few tokens all that follows from them."""

import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.dependent import options, wait
from expertmesh.kernels.remembered import remembered
from expertmesh.kernels.router.cells import counts, cut, gate_of, scores, total_of

_TAKEN = tl.constexpr(-(2**31))  # below every score, and below those of negative sign


@remembered
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
    """The K best of each row, one at a time; with GATES, also scores, gates and choices."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    wait(PDL)
    value = scores(tl.load(logits + cell, mask=inside, other=0.0), (e < E)[None, :], SIGMOID)
    # Integers that sort as the scores do, of 32 bits: a warp has one instruction for their maximum.
    rest = tl.where((e < E)[None, :], _ordered(value.to(tl.int32, bitcast=True)), _TAKEN)
    best = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    place = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for i in tl.static_range(K):
        top = tl.max(rest, axis=1)
        first = tl.min(tl.where(rest == top[:, None], e[None, :], BLOCK_E), axis=1)
        rest = tl.where(e[None, :] == first[:, None], _TAKEN, rest)
        best = tl.where((k == i)[None, :], top[:, None], best)
        place = tl.where((k == i)[None, :], first[:, None], place)
    choice = t[:, None] * K + k[None, :]
    wanted = (t < T)[:, None] & (k < K)[None, :]
    tl.store(chosen + choice, place.to(tl.int64), mask=wanted)
    if GATES:
        tl.store(score + cell, value, mask=inside)
        part = _ordered(best).to(tl.float32, bitcast=True)
        part = tl.where(wanted, part, 0.0)
        tl.store(gate + choice, gate_of(part, scale, RENORMALIZE), mask=wanted)
        hits = tl.sum((inside & (rest == _TAKEN)).to(tl.int32), axis=0)
        tl.store(count + block * E + e, hits.to(tl.int64), mask=e < E)


@triton.jit
def _ordered(bits):
    """A float32's bits as an integer that sorts as it does, or back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


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
    count_PE = counts(logits_TE)
    _launch_select(logits_TE, chosen_TK, score_TE, gate_TK, count_PE, scale, sigmoid, renormalize)
    return total_of(count_PE)


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
    rows, width, warps = cut(T, E)
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
        **options(logits_TE, warps),
    )
