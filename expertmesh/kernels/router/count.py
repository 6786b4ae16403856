# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""A layer's routing counters for few tokens, in one launch by one program."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertmesh.kernels.triton_support import has_dependent_launch


@triton.jit
def _count_kernel(
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
    t = tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    bins = tl.arange(0, BINS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(
        load_total + e,
        tl.load(load_total + e, mask=e < E, other=0) + tl.load(load + e, mask=e < E, other=0),
        mask=e < E,
    )
    tl.store(tokens_total, tl.load(tokens_total) + T)

    choice = t[:, None] * K + k[None, :]
    wanted = (t < T)[:, None] & (k < K)[None, :]
    own = tl.load(chosen + choice, mask=wanted, other=E)
    lost = tl.load(dropped + choice, mask=wanted, other=0)
    here = (t % length * BINS // length)[:, None] == bins[None, :]
    made_T1 = tl.sum((own < E).to(tl.int32), axis=1)[:, None]
    lost_T1 = tl.sum((lost != 0).to(tl.int32), axis=1)[:, None]
    made = tl.sum(tl.where(here, made_T1, 0), axis=0)
    lost = tl.sum(tl.where(here, lost_T1, 0), axis=0)
    tl.store(choices_total + bins, tl.load(choices_total + bins) + made)
    tl.store(dropped_total + bins, tl.load(dropped_total + bins) + lost)

    inside = (t < T)[:, None] & (e < E)[None, :]
    value = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=0.0)
    peak = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    shifted = value - tl.max(tl.where(inside, value, float("-inf")), axis=1)[:, None]
    shifted = tl.where(inside, shifted, 0.0)
    power = tl.where(inside, tl.exp(shifted), 0.0)
    total = tl.sum(power, axis=1)
    entropy = tl.log(total) - tl.sum(power * shifted, axis=1) / total
    entropy = tl.sum(tl.where(t < T, entropy, 0.0), axis=0)
    tl.store(entropy_total, tl.load(entropy_total) + entropy)
    tl.store(max_logit, tl.maximum(tl.load(max_logit), peak))


def count(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    dropped_TK: Tensor,
    load_E: Tensor,
    counters: list[Tensor],
    length: int,
) -> None:
    """Add one pass to load, choices, dropped, tokens, entropy and max_logit, in this order."""
    (T, E), K = logits_TE.shape, chosen_TK.shape[1]
    rows, width = triton.next_power_of_2(T), triton.next_power_of_2(E)
    dependent = has_dependent_launch(logits_TE.device)
    _count_kernel[(1,)](
        logits_TE,
        chosen_TK,
        dropped_TK,
        load_E,
        *counters,
        T,
        length,
        E,
        K,
        len(counters[1]),
        rows,
        width,
        triton.next_power_of_2(K),
        dependent,
        num_warps=min(16, max(1, rows * width // 512)),
        **({"launch_pdl": True} if dependent else {}),
    )
