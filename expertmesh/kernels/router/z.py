# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""The z-loss's mean of squared logsumexp, in two launches and one back."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.remembered import remembered

_CELLS = 4096  # logits that a program holds
_MOST_PARTS = 1024  # programs of the first launch, whose sums one program of the second adds


@remembered
@triton.jit
def _norm_kernel(
    logits,
    norm_T,
    square_P,
    T,
    span,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """logsumexp of ``span`` tokens, and the sum of its squares."""
    e = tl.arange(0, BLOCK_E)
    square = tl.zeros((BLOCK_T,), tl.float32)
    begin = tl.program_id(0) * span
    for local in range(begin, tl.minimum(begin + span, T), BLOCK_T):
        t = (local + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = (t < T)[:, None] & (e < E)[None, :]
        value = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=float("-inf"))
        most = tl.max(value, axis=1)
        # Rows beyond the last are all -inf; so may a row of logits be, and infinite its norm.
        shift = tl.where(tl.abs(most) < float("inf"), most, 0.0)
        norm = tl.log(tl.sum(tl.exp(value - shift[:, None]), axis=1)) + shift
        tl.store(norm_T + t, norm, mask=t < T)
        square += tl.where(t < T, norm * norm, 0.0)
    tl.store(square_P + tl.program_id(0), tl.sum(square, axis=0))


@remembered
@triton.jit
def _mean_kernel(square_P, mean, T, num_parts, BLOCK_P: tl.constexpr):
    part = tl.arange(0, BLOCK_P)
    square = tl.load(square_P + part, mask=part < num_parts, other=0.0)
    tl.store(mean, tl.sum(square, axis=0) / T)


@remembered
@triton.jit
def _backward_kernel(
    logits,
    norm_T,
    dmean,
    dlogits,
    T,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)[None, :]
    cell = t[:, None] * E + e[None, :]
    value = tl.load(logits + cell, mask=inside, other=float("-inf"))
    norm = tl.load(norm_T + t, mask=t < T, other=0.0)
    slope = 2.0 * tl.load(dmean) / T * norm
    tl.store(dlogits + cell, slope[:, None] * tl.exp(value - norm[:, None]), mask=inside)


def mean_square_norm(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, a scalar, and logsumexp ``(T,)``."""
    T, E = logits_TE.shape
    width = max(2, power_of_2(E))
    rows = max(1, _CELLS // width)
    span = rows * ceil_div(ceil_div(T, rows), _MOST_PARTS)
    num_parts = ceil_div(T, span)
    norm_T, square_P = logits_TE.new_empty(T), logits_TE.new_empty(num_parts)
    mean = logits_TE.new_empty(())
    _norm_kernel[(num_parts,)](logits_TE, norm_T, square_P, T, span, E, rows, width, num_warps=8)
    _mean_kernel[(1,)](square_P, mean, T, num_parts, power_of_2(num_parts))
    return mean, norm_T


def mean_square_norm_backward(logits_TE: Tensor, norm_T: Tensor, dmean: Tensor) -> Tensor:
    """The gradient of the logits."""
    T, E = logits_TE.shape
    width = max(2, power_of_2(E))
    rows = max(1, _CELLS // width)
    dlogits_TE = torch.empty_like(logits_TE)
    _backward_kernel[(ceil_div(T, rows),)](
        logits_TE, norm_T, dmean, dlogits_TE, T, E, rows, width, num_warps=8
    )
    return dlogits_TE
