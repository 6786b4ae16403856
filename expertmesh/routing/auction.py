"""Balanced linear assignment: each token one expert, each expert as many tokens as any other.

An auction (Bertsekas, "Auction algorithms for network flow problems", 1992, for groups of similar
objects) in which all free tokens bid at once, started from prices at which a softened demand is
balanced already. Free tokens are few from the first round on, so rounds are cheap.

Defined with ``torch.library.define`` as ``decision`` is: compiled code calls it as one operation.
"""

import math

import torch
from torch import Tensor

_TEMPERATURES = (0.02, 0.005)
_STEPS = 10

torch.library.define(
    "expertmesh::balanced_assignment",
    "(Tensor value, Tensor taking_part, float tolerance) -> Tensor",
)


@torch.library.impl("expertmesh::balanced_assignment", "CompositeExplicitAutograd")
def _balanced(value: Tensor, taking_part: Tensor, tolerance: float) -> Tensor:
    expert_N = torch.full_like(taking_part, value.shape[1], dtype=torch.int64)
    expert_N[taking_part] = _assign(value[taking_part].to(torch.float64), tolerance)
    return expert_N


@torch.library.register_fake("expertmesh::balanced_assignment")
def _balanced_fake(value: Tensor, taking_part: Tensor, tolerance: float) -> Tensor:
    return torch.empty_like(taking_part, dtype=torch.int64)


def balanced_assignment(
    value_NE: Tensor, padding_mask: Tensor | None = None, *, tolerance: float = 1e-3
) -> Tensor:
    """Give each token an expert so that no expert has more than ``ceil(n / E)`` of n tokens.

    The sum of the tokens' values is at most ``E ceil(n / E) * tolerance * span`` below the best
    possible, span the largest value minus the smallest; a hundredth of that is usual.

    Args:
        value_NE: ``(N, E)``. A token that has a value which is not finite takes any seat.
        padding_mask: bool ``(N,)``, True for tokens that do not take part, or None.
        tolerance: The auction's least raise over the span.

    Returns:
        int64 ``(N,)``; E for tokens that do not take part.
    """
    if padding_mask is None:
        taking_part = torch.ones(len(value_NE), dtype=torch.bool, device=value_NE.device)
    else:
        taking_part = ~padding_mask
    expert_N: Tensor = torch.ops.expertmesh.balanced_assignment(value_NE, taking_part, tolerance)
    return expert_N


def _assign(value_NE: Tensor, tolerance: float) -> Tensor:
    num_tokens, num_experts = value_NE.shape
    if num_tokens == 0 or num_experts == 1:
        return value_NE.new_zeros(num_tokens, dtype=torch.int64)
    span = float(value_NE.max() - value_NE.min())
    if not math.isfinite(span):
        value_NE, span = _with_indifferent(value_NE)
    seats = -(-num_tokens // num_experts)
    # Rows that value every expert alike fill the seats that would stay empty: where every seat is
    # taken, an auction may start from any prices.
    filling = value_NE.new_zeros(seats * num_experts - num_tokens, num_experts)
    value_NE = torch.cat([value_NE, filling])
    if span == 0:
        return torch.arange(num_tokens, device=value_NE.device) // seats
    price_E = _softly_balancing_prices(value_NE, seats, span)
    return _auction(value_NE, price_E, seats, tolerance * span)[:num_tokens]


def _with_indifferent(value_NE: Tensor) -> tuple[Tensor, float]:
    """Rows that hold NaN or infinity made to value every expert alike, and the others' span.

    No price outbids such a value: the auction would never end, where a diverged run is to go on
    to the check that finds it.
    """
    finite_N = value_NE.isfinite().all(dim=1)
    known_NE = value_NE[finite_N]
    span = float(known_NE.max() - known_NE.min()) if len(known_NE) else 0.0
    return torch.where(finite_N[:, None], value_NE, 0.0), span


def _softly_balancing_prices(value_NE: Tensor, seats: int, span: float) -> Tensor:
    """Prices at which tokens that choose by softmax fill the experts evenly (Sinkhorn's steps)."""
    value_NE = value_NE.to(torch.float32)
    price_E = value_NE.new_zeros(value_NE.shape[1])
    for temperature in (share * span for share in _TEMPERATURES):
        for _ in range(_STEPS):
            demand_E = ((value_NE - price_E) / temperature).softmax(dim=1).sum(dim=0)
            price_E += temperature * (demand_E / seats).clamp_min(1e-9).log()
    return price_E.to(torch.float64)


def _auction(value_NE: Tensor, price_E: Tensor, seats: int, raise_by: float) -> Tensor:
    """Every free token bids for its best expert as much as makes the second best as good.

    An expert seats its highest bidders, earlier tokens first among equals, and its price is its
    lowest seated bid. Ends when every token is seated.
    """
    num_tokens, num_experts = value_NE.shape
    nobody = num_experts
    seated_N = torch.full((num_tokens,), nobody, device=value_NE.device)
    bid_N = value_NE.new_zeros(num_tokens)
    free_F = torch.arange(num_tokens, device=value_NE.device)
    while len(free_F):
        best = (value_NE[free_F] - price_E).topk(2, dim=1)
        wanted_F = best.indices[:, 0]
        bid_N[free_F] = price_E[wanted_F] + best.values[:, 0] - best.values[:, 1] + raise_by
        seated_N[free_F] = wanted_F
        order_N = bid_N.argsort(descending=True, stable=True)
        order_N = order_N[seated_N[order_N].argsort(stable=True)]
        count_E = torch.bincount(seated_N, minlength=num_experts)
        begin_E = count_E.cumsum(0) - count_E
        rank_N = torch.arange(num_tokens, device=value_NE.device) - begin_E[seated_N[order_N]]
        last_E = order_N[(begin_E + seats - 1).clamp_max(num_tokens - 1)]
        price_E = torch.where(count_E >= seats, torch.maximum(price_E, bid_N[last_E]), price_E)
        free_F = order_N[rank_N >= seats].sort().values
    return seated_N
