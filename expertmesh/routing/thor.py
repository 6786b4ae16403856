"""THOR: experts drawn at random, made alike by a consistency loss (arXiv 2110.04260)."""

from typing import Literal, final

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.random import RandomKey, label
from expertmesh.routing.by_place import Places, RouterByPlace
from expertmesh.routing.draw import Draw
from expertmesh.routing.scope import scope_size

_BATCH = label("thor batch")
_TOKEN = label("thor token")


@final
class ThorRouter(RouterByPlace):
    """One expert at random; weight 1, no gate, no capacity, no balance loss (arXiv 2110.04260).

    In training one expert serves the whole micro-batch, drawn anew in every forward pass and layer
    (the authors' code). Each step makes two passes with different draws, so with two keys (or
    none), and adds ``consistency_loss`` of the two outputs.

    In evaluation each token or each sequence has an expert of its own, which depends on its place
    alone.

    Args:
        dim: D.
        num_experts: E; the authors train with 2.
        evaluation: ``"token"`` or ``"sequence"`` (the authors' levels 0 and 1).
        layer: Index that sets this router's draws apart from other layers'.

    Raises:
        ValueError: If ``evaluation`` is something else.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        evaluation: Literal["token", "sequence"] = "token",
        layer: int = 0,
    ) -> None:
        super().__init__(dim, num_experts, 1, layer=layer)
        if evaluation not in ("token", "sequence"):
            raise UserError(f"evaluation must be 'token' or 'sequence', got {evaluation!r}")
        self.evaluation = evaluation

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        return "experts are drawn, not chosen"

    def choose(self, places: Places) -> Tensor:
        if self.training:
            return self._of_batch(places.key, places.device).expand(places.num_tokens, 1)
        return self._of_each(places)

    def _of_batch(self, key: RandomKey | None, device: torch.device) -> Tensor:
        """``(1, 1)``: the expert of a training pass, the same on all ranks."""
        index_1 = torch.zeros(1, dtype=torch.int64, device=device)
        if key is not None:
            key = RandomKey(key.seed, index_1)
        draw = Draw(key, self.layer, 1, device, self.training)
        expert_11 = self._expert(draw.uniform(_BATCH, 1, torch.float32))
        if key is None:  # ranks have drawn each for itself
            expert_11 = self.population.arrange(1, None, None).whole(expert_11)[:1]
        return expert_11

    def _of_each(self, places: Places) -> Tensor:
        """``(T, 1)``: experts by the place of the token, or of its sequence, in the batch."""
        order = self.population.arrange(places.num_tokens, places.sequence_length, places.key)
        place_T = order.own(torch.arange(order.num_tokens, device=places.device))
        if self.evaluation == "sequence":
            place_T = place_T // scope_size("sequence", order.num_tokens, order.sequence_length)
        by_place = RandomKey(torch.zeros((), dtype=torch.int64, device=places.device), place_T)
        draw = Draw(by_place, self.layer, places.num_tokens, places.device, training=False)
        return self._expert(draw.uniform(_TOKEN, 1, torch.float32))

    def _expert(self, uniform: Tensor) -> Tensor:
        return (uniform * self.num_experts).long().clamp_max(self.num_experts - 1)


def consistency_loss(
    first: Tensor, second: Tensor, *, coef: float = 5.0, padding_mask: Tensor | None = None
) -> Tensor:
    """``coef * sum (KL(p1 || p2) + KL(p2 || p1)) / 2`` over tokens (arXiv 2110.04260).

    It is a sum, like a sum of cross-entropies: divide both by the step's target tokens. The
    authors' loss is ``CE(p1) + CE(p2) + 5 *`` this with their coefficient.

    Args:
        first: Logits of one pass, ``(..., V)``.
        second: Logits of the other, of the same shape.
        coef: What multiplies it.
        padding_mask: bool ``(...)``, True where a token does not count, or None.

    Returns:
        A scalar in float32 or wider; gradient flows into both.

    Raises:
        ValueError: If shapes differ or ``coef`` is negative.
    """
    if first.shape != second.shape:
        raise UserError(
            f"second must have first's shape {tuple(first.shape)}, got {tuple(second.shape)}"
        )
    if not coef >= 0:
        raise UserError(f"coef of the consistency loss must be at least 0, got {coef}")
    wide = torch.promote_types(first.dtype, torch.float32)
    if padding_mask is not None:
        mask = padding_mask.unsqueeze(-1)
        first = torch.where(mask, torch.zeros_like(first), first)
        second = torch.where(mask, torch.zeros_like(second), second)
    log_p1, log_p2 = first.to(wide).log_softmax(-1), second.to(wide).log_softmax(-1)
    # KL(p1 || p2) + KL(p2 || p1) in one sum; both logits of a masked token are zero, and so is it.
    return coef * 0.5 * ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum()
