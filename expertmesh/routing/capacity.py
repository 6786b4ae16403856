"""How many tokens an expert may take, and who is left out when more want it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expertmesh.errors import UserError, nearest
from expertmesh.random import label
from expertmesh.routing.draw import Draw
from expertmesh.routing.logits import coarse
from expertmesh.routing.population import Arrangement
from expertmesh.routing.scope import Scope, check_scope, scope_size
from expertmesh.routing.selection import rank_within

_DROP_ORDER = label("drop order")


def _multiple_of_4(slots: int) -> int:
    return -(-slots // 4) * 4


def _fraction(numerator: float, denominator: int) -> float:
    # Nudged so that 1.1 * 30 / 3 counts as 11: decimal factors are not exact in binary.
    return round(numerator / denominator, 9)


FORMULAS: dict[str, Callable[[int, int, int, float], int]] = {
    "switch": lambda s, e, k, f: min(s, max(4, math.floor(_fraction(s * f, e)))),
    "lingvo": lambda s, e, k, f: _multiple_of_4(max(4, math.floor(_fraction(s * f, e)))),
    "flaxformer": lambda s, e, k, f: max(4, round(_fraction(s * f, e))),
    "vmoe": lambda s, e, k, f: _multiple_of_4(math.ceil(_fraction(k * s * f, e))),
    "deepspeed": lambda s, e, k, f: max(4, math.ceil(_fraction(k * s * f, e))),
    "colossalai": lambda s, e, k, f: max(4, (math.floor(_fraction(k * s * f, e)) + 1) // 2 * 2),
    "tutel": lambda s, e, k, f: k * math.floor(round(f * math.ceil(s / e), 9)),
    "megatron": lambda s, e, k, f: math.ceil(_fraction(k * s * f, e)),
    "proportional": lambda s, e, k, f: math.floor(_fraction(k * s * f, e)),
}
"""Slots per expert from (group size S, experts E, choices k, factor f). Sources: papers' codes.

switch: min(S, max(4, floor(S f / E))), without k (mesh-tensorflow); lingvo (GShard):
floor(S f / E) raised to a multiple of 4; flaxformer (ST-MoE): round(f S / E), at least 4;
vmoe: ceil(k S f / E) raised to a multiple of 4; deepspeed: ceil(k S f / E), at least 4;
colossalai: floor(k f S / E) made even, at least 4; tutel: k floor(f ceil(S / E));
megatron: ceil(k S f / E); proportional (MegaBlocks' MoE): floor(k f S / E).
"""

DropOrder = Literal["position", "token", "priority", "probability", "random"]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A limit on the choices that each expert takes from each group of tokens.

    The size of a group counts padding, so that shapes and limits are static; padding takes no slot.

    Attributes:
        factor: Capacity factor in training.
        eval_factor: Capacity factor in evaluation; None drops nothing there.
        formula: A key of ``FORMULAS``. The same factor means other limits under other names: with
            S=100, E=8, k=2 and 1.25 switch gives 15, flaxformer and lingvo 16, proportional 31, the
            rest 32.
        order: Who gets the slots. ``"position"``: all first choices before all second ones, each in
            the order of tokens (Switch, GShard, ST-MoE). ``"token"``: token by token, which lets no
            later token push out an earlier one. ``"priority"``: as position, tokens sorted by the
            highest score of their choices, as it is before renormalisation and scale (the batch
            priority of V-MoE and Tutel). ``"probability"``: choices sorted by weight (Megatron's
            ``probs``). ``"random"``: choices in random order (DeepSpeed's RTS). What agrees to 12
            bits counts as equal, and the earlier token comes first.
        scope: The group of tokens that shares slots.
    """

    factor: float
    eval_factor: float | None = None
    formula: str = "proportional"
    order: DropOrder = "position"
    scope: Scope = "micro_batch"

    def __post_init__(self) -> None:
        for field in ("factor", "eval_factor"):
            value = getattr(self, field)
            if value is None and field == "eval_factor":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                dropless = {
                    "factor": "leave the capacity out for dropless routing",
                    "eval_factor": "None drops nothing in evaluation",
                }
                raise UserError(
                    f"capacity {field} must be a finite number above 0, got {value!r}; "
                    f"{dropless[field]}"
                )
        if self.formula not in FORMULAS:
            raise UserError(
                f"capacity formula must be one of {', '.join(FORMULAS)}, got {self.formula!r}"
                + nearest(self.formula, FORMULAS)
            )
        if self.order not in _ORDERS:
            raise UserError(
                f"capacity order must be one of {', '.join(_ORDERS)}, got {self.order!r}"
                + nearest(self.order, _ORDERS)
            )
        check_scope("capacity scope", self.scope)

    def slots(self, group_size: int, num_experts: int, k: int, *, training: bool) -> int | None:
        """Slots per expert and group, or None for no limit."""
        factor = self.factor if training else self.eval_factor
        if factor is None:
            return None
        return FORMULAS[self.formula](group_size, num_experts, k, factor)

    def leaks(self, k: int) -> str | None:
        """Why later tokens may decide who finds a slot, or None; see ``Router.leaks``."""
        if self.order == "token" or (self.order == "position" and k == 1):
            return None
        return f"capacity order {self.order!r} lets later tokens take slots before earlier ones"

    def most_per_expert(
        self, order: Arrangement, num_experts: int, k: int, *, training: bool
    ) -> int | None:
        """A bound on the choices that name one expert after dropping, over all groups."""
        size = scope_size(self.scope, order.num_tokens, order.sequence_length)
        slots = self.slots(size, num_experts, k, training=training)
        return None if slots is None else slots * (order.num_tokens // size)

    def drop(
        self,
        chosen_TK: Tensor,
        worth_TK: Tensor,
        num_experts: int,
        *,
        training: bool,
        order: Arrangement,
        draw: Draw,
    ) -> Tensor:
        """Replace the choices that find no slot by the sentinel E.

        Args:
            chosen_TK: int64 ``(T, K)``; E marks choices that want no slot.
            worth_TK: ``(T, K)``, what ``order`` sorts by: scores for ``"priority"``, weights for
                ``"probability"``.
            num_experts: E.
            training: Which factor applies.
            order: Of the tokens that share the slots, on whichever ranks they are.
            draw: For ``order="random"``.

        Returns:
            int64 ``(T, K)``.
        """
        k = chosen_TK.shape[1]
        size = scope_size(self.scope, order.num_tokens, order.sequence_length)
        slots = self.slots(size, num_experts, k, training=training)
        if slots is None or order.num_tokens == 0:
            return chosen_TK
        chosen_NK = order.whole(chosen_TK)
        served_N = _ORDERS[self.order](chosen_TK, worth_TK.detach(), draw, order)
        token_N = served_N // k
        num_buckets = order.num_tokens // size * (num_experts + 1)
        bucket_N = token_N // size * (num_experts + 1) + chosen_NK.reshape(-1)[served_N]
        full_N = rank_within(bucket_N, num_buckets) >= slots
        full_NK = torch.empty_like(full_N).scatter_(0, served_N, full_N).view(-1, k)
        return torch.where(order.own(full_NK), num_experts, chosen_TK)


def _by_position(chosen_TK: Tensor, worth_TK: Tensor, draw: Draw, order: Arrangement) -> Tensor:
    k = chosen_TK.shape[1]
    flat = torch.arange(order.num_tokens * k, device=chosen_TK.device)
    return flat.view(order.num_tokens, k).T.reshape(-1)


def _by_token(chosen_TK: Tensor, worth_TK: Tensor, draw: Draw, order: Arrangement) -> Tensor:
    return torch.arange(order.num_tokens * chosen_TK.shape[1], device=chosen_TK.device)


def _by_priority(chosen_TK: Tensor, worth_TK: Tensor, draw: Draw, order: Arrangement) -> Tensor:
    k = chosen_TK.shape[1]
    best_N = order.whole(coarse(worth_TK.amax(dim=1)))
    token_N = best_N.argsort(descending=True, stable=True)
    return (token_N[:, None] * k + torch.arange(k, device=token_N.device)).T.reshape(-1)


def _by_probability(chosen_TK: Tensor, worth_TK: Tensor, draw: Draw, order: Arrangement) -> Tensor:
    return order.whole(coarse(worth_TK)).reshape(-1).argsort(descending=True, stable=True)


def _at_random(chosen_TK: Tensor, worth_TK: Tensor, draw: Draw, order: Arrangement) -> Tensor:
    lottery_TK = draw.uniform(_DROP_ORDER, chosen_TK.shape[1], torch.float64)
    return order.whole(lottery_TK).reshape(-1).argsort(stable=True)


# Each gives a permutation of the flat choices t * K + k of all tokens, first served first.
_ORDERS: dict[str, Callable[[Tensor, Tensor, Draw, Arrangement], Tensor]] = {
    "position": _by_position,
    "token": _by_token,
    "priority": _by_priority,
    "probability": _by_probability,
    "random": _at_random,
}
