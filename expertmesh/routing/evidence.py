"""What the balance losses look at, and sums of it over ranks that meet as rarely as they can."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertmesh.kernels.router import counts, router_sums
from expertmesh.random import RandomKey
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.population import Alone, Population
from expertmesh.routing.scope import Scope, scope_size


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a loss may look at: one layer's scores and choices for one micro-batch.

    Attributes:
        logits: Router logits with and without noise.
        score_TE: ``(T, E)`` softmax or sigmoid scores, with gradient.
        chosen_TK: int64 ``(T, K)``, the k best, before any is skipped by rule or dropped: losses
            count these, as the published codes do. E marks padding.
        gate_TK: ``(T, K)`` combine weights before capacity.
        padding_mask: bool ``(T,)``, True for padding, or None.
        sequence_length: Tokens of a sequence on this rank, or None.
        population: The ranks whose tokens form the micro-batch.
        key: Says where each token stands in it, or None.
        norm_T: logsumexp of the logits without noise, with gradient, where it is known already.
        softmax: Whether ``score_TE`` came out of a softmax.
    """

    logits: NoisyLogits
    score_TE: Tensor
    chosen_TK: Tensor
    gate_TK: Tensor
    padding_mask: Tensor | None
    sequence_length: int | None
    population: Population
    key: RandomKey | None
    norm_T: Tensor | None = None
    softmax: bool = False
    _num_tokens: dict[Scope, Tensor] = field(default_factory=dict, init=False)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.score_TE.shape[1]

    @property
    def k(self) -> int:
        """Choices per token."""
        return self.chosen_TK.shape[1]

    def probability_TE(self) -> Tensor:
        """Scores as a distribution over experts (sigmoid scores divided by their sum)."""
        total_T1 = self.score_TE.sum(dim=1, keepdim=True)
        return self.score_TE / total_T1.clamp_min(torch.finfo(total_T1.dtype).tiny)

    def spread(self, value_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """``(T, K)`` values laid out by expert, ``(T, E)``; sentinels left out."""
        num_tokens, num_experts = self.score_TE.shape
        out = value_TK.new_zeros(num_tokens, num_experts + 1)
        return out.scatter_add(1, chosen_TK, value_TK)[:, :num_experts]

    def total(self, value_TX: Tensor, scope: Scope) -> Tensor:
        """``totals`` of one value."""
        return self.totals((value_TX,), scope)[0]

    def totals(self, values: Sequence[Tensor], scope: Scope) -> list[Tensor]:
        """Sums over the valid tokens of each group: ``(T, ...)`` to ``(groups, ...)`` each.

        A group's tokens may lie on several ranks. Groups are all of the micro-batch's, or, of
        sequences, those that this rank has a part of. Ranks meet once for all values, and for the
        number of tokens if that is not known yet.
        """
        if self.is_whole or scope in self._num_tokens:
            return self._sums(values, scope)
        *sums, count_G = self._sums((*values, self._ones_T()), scope)
        self._num_tokens[scope] = count_G.detach()
        return sums

    def per_token(self, values: Sequence[Tensor], scope: Scope) -> list[Tensor]:
        """``totals`` over the number of tokens: the mean of each group, 0 without tokens."""
        sums = self.totals(values, scope)
        count_G = self.num_tokens(scope).clamp_min(1)
        return [sum_GX / count_G.view(-1, *[1] * (sum_GX.dim() - 1)) for sum_GX in sums]

    def _ones_T(self) -> Tensor:
        return torch.ones_like(self.score_TE[:, 0])

    def _sums(self, values: Sequence[Tensor], scope: Scope) -> list[Tensor]:
        if len(values) == 1:
            return [self._sum(values[0], scope)]
        rows = [value_TX.unsqueeze(-1).flatten(1) for value_TX in values]
        sum_GX = self._sum(torch.cat(rows, dim=1), scope)
        parts = sum_GX.split([row_TX.shape[1] for row_TX in rows], dim=1)
        return [
            part_GX.reshape(len(part_GX), *value_TX.shape[1:])
            for part_GX, value_TX in zip(parts, values, strict=True)
        ]

    def _sum(self, value_TX: Tensor, scope: Scope) -> Tensor:
        if self.padding_mask is not None:
            mask = self.padding_mask.view(-1, *[1] * (value_TX.dim() - 1))
            value_TX = torch.where(mask, torch.zeros_like(value_TX), value_TX)
        if scope == "sequence":
            size = scope_size(scope, len(value_TX), self.sequence_length)
            value_GX = value_TX.reshape(-1, size, *value_TX.shape[1:]).sum(dim=1)
            return self.population.sequence_total(value_GX)
        if scope == "micro_batch":
            return self.population.total(value_TX.unsqueeze(0).sum(dim=1))
        order = self.population.arrange(len(value_TX), self.sequence_length, self.key)
        size = scope_size(scope, order.num_tokens, None)
        return self.population.total(order.group_sums(value_TX, size))

    @property
    def is_whole(self) -> bool:
        """Whether these are all tokens of the micro-batch, and none of them is padding."""
        alone = isinstance(self.population, Alone)
        return alone and self.padding_mask is None and len(self.score_TE) > 0

    def mean(self, value_G: Tensor, scope: Scope) -> Tensor:
        """Mean over the groups that hold a token; 0 if none does."""
        if self.is_whole:
            return value_G.mean() if len(value_G) > 1 else value_G.reshape(())
        occupied_G = self.num_tokens(scope) > 0
        if scope == "micro_batch":
            return torch.where(occupied_G, value_G, 0).reshape(())
        kept = torch.where(occupied_G, value_G, torch.zeros_like(value_G)).sum()
        number = occupied_G.sum().to(kept.dtype)
        if scope == "sequence":
            # Every rank that has a part of a sequence counts it, above and below the line.
            both = torch.stack([kept, number])
            both = self.population.total(both, copies=self.population.ranks_per_sequence)
            kept, number = both.unbind()
        return kept / number.clamp_min(1)

    def num_tokens(self, scope: Scope) -> Tensor:
        """Valid tokens of each group, ``(groups,)``, in the scores' dtype; asked for once."""
        if scope not in self._num_tokens:
            self._num_tokens[scope] = self._sum(self._ones_T(), scope)
        return self._num_tokens[scope]

    def load_and_probability(self, chosen_TK: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """Means over the tokens of each group, ``(groups, E)``: choices of e, probability of e.

        Ranks meet once, and learn the number of tokens too if that is not known yet.
        """
        split = not isinstance(self.population, Alone) and self.padding_mask is None
        if split and scope == "micro_batch" and counts(self.score_TE):
            sum_1X = router_sums(self.score_TE, chosen_TK, softmax=self.softmax).unsqueeze(0)
            # Other ranks may be in the branch below, so as many numbers are sent as there.
            if scope in self._num_tokens:
                sum_1X = self.population.total(sum_1X[:, :-1])
            else:
                sum_1X, count_11 = self.population.total(sum_1X).tensor_split([-1], dim=1)
                self._num_tokens[scope] = count_11[:, 0].detach()
            mean_1X = sum_1X / self._num_tokens[scope].clamp_min(1)
            load_GE, probability_GE = mean_1X.split(self.num_experts, dim=1)
        else:
            hits_TE = self.spread(torch.ones_like(chosen_TK, dtype=self.score_TE.dtype), chosen_TK)
            load_GE, probability_GE = self.per_token((hits_TE, self.probability_TE()), scope)
        return load_GE.detach(), probability_GE
