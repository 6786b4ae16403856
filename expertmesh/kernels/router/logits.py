# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Logits of few tokens, and the parts of which products of many are made."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.dependent import options, wait
from expertmesh.kernels.remembered import remembered
from expertmesh.kernels.router.cells import prefetch


@remembered
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
    d = tl.arange(0, BLOCK_D)
    row = weight + tl.minimum(e, E - 1).to(tl.int64)[:, None] * D + d[None, :]
    if PDL:
        prefetch(weight, tl.program_id(0) * (BLOCK_E * D), BLOCK_E * BLOCK_D, E * D)
    wait(PDL)
    first = tl.load(row, mask=d[None, :] < D, other=0.0).to(tl.float32)
    for offset in tl.static_range(BLOCK_T):
        t = tl.program_id(1) * BLOCK_T + offset
        x_row = x + tl.minimum(t, T - 1).to(tl.int64) * D + d
        total = first * tl.load(x_row, mask=d < D, other=0.0).to(tl.float32)[None, :]
        for start in tl.static_range(BLOCK_D, D, BLOCK_D):
            inside = start + d < D
            value = tl.load(x_row + start, mask=inside, other=0.0).to(tl.float32)
            part = tl.load(row + start, mask=inside[None, :], other=0.0).to(tl.float32)
            total += part * value[None, :]
        wanted = e < tl.where(t < T, E, 0)
        tl.store(logits + t.to(tl.int64) * E + e, tl.sum(total, axis=1), mask=wanted)


@remembered
@triton.jit
def _split_kernel(
    source,
    parts,
    num,
    group_stride,
    COLUMNS: tl.constexpr,
    ROW: tl.constexpr,
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


@remembered
@triton.jit
def _add_parts_kernel(parts, out, num, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Logits from their parts, the smallest first."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part_ptrs = parts + i // E * (PARTS * E) + i % E
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptrs + (PARTS - 1 - part) * E, mask=i < num, other=0.0)
    tl.store(out + i, total, mask=i < num)


def few_logits(x_TD: Tensor, weight_ED: Tensor, logits_TE: Tensor) -> None:
    """Write ``x W^T`` for a number of tokens at which reading the weights is the work."""
    (T, D), E = x_TD.shape, len(weight_ED)
    # Of one token the programs are few, and each is to wait for as little as it can.
    experts, tokens = 1 if T == 1 else 4, 1 if T <= 16 else 4
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
        **options(x_TD, 4),
    )


def add_parts(parts_TPE: Tensor) -> Tensor:
    """Their sum, ``(T, E)``."""
    T, P, E = parts_TPE.shape
    logits_TE = parts_TPE.new_empty(T, E)
    num, block = logits_TE.numel(), 1024
    _add_parts_kernel[(ceil_div(num, block),)](parts_TPE, logits_TE, num, E, P, block, num_warps=4)
    return logits_TE


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
        columns if by_row else num,
        columns,
        shape[1],
        pattern,
        block,
        num_warps=4,
    )
    return out
