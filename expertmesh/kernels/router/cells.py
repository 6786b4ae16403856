# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""What the router's kernels share. Everything is float32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.remembered import remembered

_ROWS = tl.constexpr(256)  # programs' counts that are added up at once
_TOTALED = 8  # experts whose counts one program adds up
TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32


@triton.jit
def prefetch(base, first, COUNT: tl.constexpr, end):
    """Ask for the lines of COUNT numbers, a power of 2, in L2 while the kernel before ends.

    Nothing is read: they may still be written.
    """
    LINE: tl.constexpr = 1024 // base.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    LINES: tl.constexpr = (COUNT + LINE - 1) // LINE  # one at least
    number = tl.minimum(first + tl.arange(0, LINES) * LINE, end - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [(base + number).to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def softmax(logits, inside):
    """With each row's largest logit, and the sum of exponentials over it."""
    logits = tl.where(inside, logits, float("-inf"))
    peak = tl.max(logits, axis=1)
    power = tl.exp(logits - peak[:, None])
    total = tl.sum(power, axis=1)
    return power / total[:, None], peak, total


@triton.jit
def scores(logits, inside, SIGMOID: tl.constexpr):
    if SIGMOID:
        score = tl.sigmoid(logits)
    else:
        score, _, _ = softmax(logits, inside)
    return score


@triton.jit
def gate_of(part, scale, RENORMALIZE: tl.constexpr):
    if RENORMALIZE:
        part = part / tl.maximum(tl.sum(part, axis=1), TINY)[:, None]
    return scale * part


def cut(num_tokens: int, num_experts: int) -> tuple[int, int, int]:
    """Tokens of a program, width of a row, warps."""
    width = max(2, power_of_2(num_experts))
    rows = min(power_of_2(num_tokens), max(1, 4096 // width))
    return rows, width, min(16, max(1, rows * width // 512))


def counts(logits_TE: Tensor) -> Tensor:
    """Room for each program's choices per expert."""
    (T, E) = logits_TE.shape
    programs = ceil_div(T, cut(T, E)[0])
    return torch.empty(programs, E, dtype=torch.int64, device=logits_TE.device)


def total_of(count_PE: Tensor) -> Tensor:
    """All programs' choices per expert."""
    num_parts, E = count_PE.shape
    if num_parts == 1:
        return count_PE[0]
    total_E = count_PE.new_empty(E)
    _total_kernel[(ceil_div(E, _TOTALED),)](count_PE, total_E, num_parts, E, _TOTALED, num_warps=8)
    return total_E


@remembered
@triton.jit(do_not_specialize=["num_parts"])
def _total_kernel(count_PE, total_E, num_parts, E: tl.constexpr, BLOCK_E: tl.constexpr):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    rows = tl.arange(0, _ROWS)
    count = tl.zeros((_ROWS, BLOCK_E), tl.int64)
    for begin in range(0, num_parts, _ROWS):
        part = (begin + rows).to(tl.int64)
        inside = (part < num_parts)[:, None] & (e < E)[None, :]
        count += tl.load(count_PE + part[:, None] * E + e[None, :], mask=inside, other=0)
    tl.store(total_E + e, tl.sum(count, axis=0), mask=e < E)
