# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Triton kernels of the ``decode`` backend: each reads weights once and little else.

``*_rows`` serve single assignments by dot products of vectors, for a token or a few. ``*_experts``
serve all rows of one expert by matrix products with the weights on the left, because tensor cores
take 64 rows on that side and as few as 16 columns on the other.
"""

import triton
import triton.language as tl

from expertmesh.kernels.dependent import wait
from expertmesh.kernels.moe_mlp.fused.activations import activate
from expertmesh.kernels.remembered import remembered


@remembered
@triton.jit
def group_kernel(
    expert,
    order,
    offsets,
    N,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sort assignments by (expert, index) by counting how many come before each.

    Args: ``expert`` int64 (N); ``order`` int32 (N), the assignment at each position; ``offsets``
    int32 (E + 1), where each expert's positions start, sentinels last.
    """
    wait(PDL)
    every = tl.arange(0, NP)
    theirs = tl.load(expert + every, mask=every < N, other=E).to(tl.int32)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(expert + mine, mask=mine < N, other=E).to(tl.int32)
    before = (theirs[None, :] < own[:, None]) | (
        (theirs[None, :] == own[:, None]) & (every[None, :] < mine[:, None])
    )
    position = tl.sum((before & (every < N)[None, :]).to(tl.int32), axis=1)
    tl.store(order + position, mine, mask=mine < N)
    lower = (theirs[None, :] < mine[:, None]) & (every < N)[None, :]
    tl.store(offsets + mine, tl.sum(lower.to(tl.int32), axis=1), mask=mine <= E)


@remembered
@triton.jit
def up_rows_kernel(
    x,
    expert,
    up,
    bias,
    hidden,
    E: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EXPERT: tl.constexpr,
    PART: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """``hidden[n] = activation(up[expert[n]] x[n // K])`` for one assignment and BLOCK_F units.

    PARTS projections are multiplied, see ``_store_hidden``. EXPERT, PART and UNIT are strides of
    ``up``; its last dim has stride 1.
    """
    n = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.minimum(f, F - 1)
    inner = tl.arange(0, BLOCK_D)
    wait(PDL)
    e = tl.load(expert + n)
    if e < E:
        first_row = up + (e * EXPERT + row.to(tl.int64) * UNIT)[:, None]
        x_row = x + (n // K).to(tl.int64) * D
        first = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
        second = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
        third = tl.zeros((BLOCK_F, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + inner
            value = tl.load(x_row + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
            weight = tl.load(first_row + d[None, :], mask=d[None, :] < D, other=0.0)
            first += weight.to(tl.float32) * value
            if PARTS > 1:
                weight = tl.load(first_row + PART + d[None, :], mask=d[None, :] < D, other=0.0)
                second += weight.to(tl.float32) * value
            if PARTS > 2:
                weight = tl.load(first_row + 2 * PART + d[None, :], mask=d[None, :] < D, other=0.0)
                third += weight.to(tl.float32) * value
        _store_hidden(
            tl.sum(first, axis=1)[None, :],
            tl.sum(second, axis=1)[None, :],
            tl.sum(third, axis=1)[None, :],
            bias,
            e,
            hidden,
            n + tl.zeros((1,), tl.int64),
            tl.full((1,), 1, tl.int1),
            f,
            F,
            PARTS,
            ACTIVATION,
            HAS_BIAS,
        )


@triton.jit
def _store_hidden(
    first,
    second,
    third,
    bias,
    e,
    hidden,
    position,
    wanted,
    f,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add the bias, activate and store, ``(positions, units)``.

    Of one part the activation, of two ``act(first) * second``, of three
    ``first * act(second) * third``.
    """
    if HAS_BIAS:
        own = bias + e * (PARTS * F) + f
        first += tl.load(own, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if PARTS > 1:
            second += tl.load(own + F, mask=f < F, other=0.0).to(tl.float32)[None, :]
        if PARTS > 2:
            third += tl.load(own + 2 * F, mask=f < F, other=0.0).to(tl.float32)[None, :]
    if PARTS == 3:
        value = first * activate(second, ACTIVATION) * third
    elif PARTS == 2:
        value = activate(first, ACTIVATION) * second
    else:
        value = activate(first, ACTIVATION)
    target = hidden + position.to(tl.int64)[:, None] * F + f[None, :]
    mask = wanted[:, None] & (f < F)[None, :]
    tl.store(target, value.to(hidden.dtype.element_ty), mask=mask)


@remembered
@triton.jit
def down_rows_kernel(
    hidden,
    expert,
    weight,
    down,
    bias,
    y,
    E: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[r] = sum_k weight[r, k] down[expert[r, k]] hidden[r K + k]`` for BLOCK_D outputs."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.minimum(d, D - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_F)
    wait(PDL)
    acc = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        n = r * K + k
        e = tl.load(expert + n)
        valid = e < E
        width = tl.where(valid, F, 0)
        e = tl.minimum(e, E - 1)
        matrix = down + (e * D + row)[:, None] * F
        share = tl.load(weight + n, mask=valid, other=0.0).to(tl.float32)
        for start in range(0, F, BLOCK_F):
            f = start + inner
            wanted = f < width
            unit = tl.load(hidden + n * F + f, mask=wanted, other=0.0).to(tl.float32) * share
            tile = tl.load(matrix + f[None, :], mask=wanted[None, :], other=0.0)
            acc += tile.to(tl.float32) * unit[None, :]
        if HAS_BIAS:
            total += share * tl.load(bias + e * D + row).to(tl.float32)
    total += tl.sum(acc, axis=1)
    tl.store(y + r * D + d, total.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def _columns(row, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns ``d`` of weights whose rows begin at ``row``."""
    if D % BLOCK_D == 0:
        weight = tl.load(row + d[None, :])
    else:
        weight = tl.load(row + d[None, :], mask=d[None, :] < D, other=0.0)
    return weight


@remembered
@triton.jit
def up_experts_kernel(
    x,
    order,
    offsets,
    up,
    bias,
    hidden,
    F: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    EXPERT: tl.constexpr,
    PART: tl.constexpr,
    UNIT: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Hidden units of one expert's rows, at their grouped positions, BLOCK_F at a time."""
    e = tl.program_id(1)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    row = tl.minimum(f, F - 1)
    inner = tl.arange(0, BLOCK_D)
    first_row = up + (e.to(tl.int64) * EXPERT + row.to(tl.int64) * UNIT)[:, None]
    wait(PDL)
    begin = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    for top in range(begin, end, BLOCK_N):
        position = top + tl.arange(0, BLOCK_N)
        # The last row stands in for those past the end: loads without a mask stay 16 bytes wide.
        n = tl.load(order + tl.minimum(position, end - 1))
        x_row = x + (n // K).to(tl.int64)[None, :] * D
        first = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
        second = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
        third = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            d = start + inner
            if D % BLOCK_D == 0:
                value = tl.load(x_row + d[:, None])
            else:
                value = tl.load(x_row + d[:, None], mask=d[:, None] < D, other=0.0)
            weight = _columns(first_row, d, D, BLOCK_D)
            first = tl.dot(weight, value, first, input_precision=PRECISION)
            if PARTS > 1:
                weight = _columns(first_row + PART, d, D, BLOCK_D)
                second = tl.dot(weight, value, second, input_precision=PRECISION)
            if PARTS > 2:
                weight = _columns(first_row + 2 * PART, d, D, BLOCK_D)
                third = tl.dot(weight, value, third, input_precision=PRECISION)
        _store_hidden(
            tl.trans(first),
            tl.trans(second),
            tl.trans(third),
            bias,
            e,
            hidden,
            position,
            position < end,
            f,
            F,
            PARTS,
            ACTIVATION,
            HAS_BIAS,
        )


@remembered
@triton.jit
def down_experts_kernel(
    hidden,
    order,
    offsets,
    down,
    bias,
    partial,
    N,
    D: tl.constexpr,
    F: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """``partial[split, n] = down[e] hidden`` over one part of F, for one expert's rows."""
    e = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.minimum(d, D - 1)
    inner = tl.arange(0, BLOCK_F)
    matrix = down + (e.to(tl.int64) * D + row)[:, None] * F
    span: tl.constexpr = tl.cdiv(tl.cdiv(F, BLOCK_F), SPLITS) * BLOCK_F
    wait(PDL)
    begin = tl.load(offsets + e)
    end = tl.load(offsets + e + 1)
    for first in range(begin, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        held = tl.minimum(position, end - 1)
        unit_row = hidden + held.to(tl.int64)[None, :] * F
        acc = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
        for start in tl.range(
            split * span, tl.minimum(split * span + span, F), BLOCK_F, num_stages=STAGES
        ):
            f = start + inner
            if F % BLOCK_F == 0:
                unit = tl.load(unit_row + f[:, None])
                tile = tl.load(matrix + f[None, :])
            else:
                unit = tl.load(unit_row + f[:, None], mask=f[:, None] < F, other=0.0)
                tile = tl.load(matrix + f[None, :], mask=f[None, :] < F, other=0.0)
            acc = tl.dot(tile, unit, acc, input_precision=PRECISION)
        out = tl.trans(acc)
        if HAS_BIAS:  # noqa: SIM102 (known when compiling; the inner condition is not)
            if split == 0:
                out += tl.load(bias + e.to(tl.int64) * D + row).to(tl.float32)[None, :]
        n = tl.load(order + held)
        target = partial + (split.to(tl.int64) * N + n)[:, None] * D + d[None, :]
        tl.store(target, out, mask=(position < end)[:, None] & (d < D)[None, :])


@remembered
@triton.jit
def combine_kernel(
    partial,
    expert,
    weight,
    y,
    N,
    E: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """``y[r] = sum_k weight[r, k] sum_s partial[s, r K + k]``, in this order."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    wait(PDL)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        n = r * K + k
        valid = tl.load(expert + n) < E
        width = tl.where(valid, D, 0)
        share = tl.load(weight + n, mask=valid, other=0.0).to(tl.float32)
        out = tl.zeros((BLOCK_D,), tl.float32)
        for split in tl.static_range(SPLITS):
            source = partial + (split * N + n) * D + d
            out += tl.load(source, mask=d < width, other=0.0)
        total += tl.where(valid, share * out, 0.0)
    tl.store(y + r * D + d, total.to(y.dtype.element_ty), mask=d < D)
