"""Strictly balanced gating with learned thresholds (Shazeer et al., arXiv 1701.06538, app. F)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_deviation, check_sizes
from expertmesh.routing.decision import decision
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.group_losses import DeviceBalanceLoss
from expertmesh.routing.logits import wide_logits, without_padding
from expertmesh.routing.losses import (
    BalanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    by_name,
    check_losses,
)
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.picks import best_tokens, groups_of, rank_of, rows_of
from expertmesh.routing.replay import recorded
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.scope import Scope, check_scope
from expertmesh.routing.selection import count_experts


@dataclass(frozen=True, kw_only=True)
class ThresholdEvidence(Evidence):
    """What a loss may look at where experts chose; ``chosen_TK`` is ``(T, E)``, E for "not this".

    Attributes:
        threshold_E: Those that are to stand in for the choice.
    """

    threshold_E: Tensor


@dataclass(frozen=True, kw_only=True)
class ThresholdLoss(BalanceLoss):
    """Trains the thresholds: L_batchwise (Shazeer et al., arXiv 1701.06538, app. F). At least 0.

    ``sum_t sum_e (1{X_te > T_e} - M_te) (X_te - T_e)``, X the softmax and M the choice of the
    batch, over the number of tokens, so that it does not grow with them; the paper prints the sum.
    As printed it reaches the router's weights too. 0 where thresholds choose as the batch did.

    Attributes:
        coef: What multiplies it.
        name: Its key in ``Routing.losses``.
    """

    coef: float = 1.0
    name: str = "threshold"
    only_for: ClassVar[str | None] = "BatchwiseRouter"

    def __call__(self, evidence: Evidence) -> Tensor:
        assert isinstance(evidence, ThresholdEvidence)
        over_TE = evidence.score_TE - evidence.threshold_E
        wrong_TE = (over_TE > 0).to(over_TE.dtype)
        wrong_TE = wrong_TE - (evidence.chosen_TK < evidence.num_experts).to(over_TE.dtype)
        (mean_1,) = evidence.per_token(((wrong_TE * over_TE).sum(dim=1),), "micro_batch")
        return self.coef * mean_1.reshape(())


@final
class BatchwiseRouter(Router):
    """Each expert takes ``m = k n / E`` of n tokens in training, those above a threshold later.

    Shazeer et al., arXiv 1701.06538, appendix F. ``G(x)_i = S_i M_i / sum_j S_j M_j`` with
    ``S = softmax(x W^T)``. In training M marks the m tokens of each expert's highest S, ties to
    the earlier token, scores that agree to 12 bits counting as ties; in evaluation
    ``S_i > T_i``, with thresholds T trained by ``ThresholdLoss``, so evaluation does not look at
    other tokens. A token may get any number of experts, none included.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token on average; may be a fraction.
        scope: The tokens out of which experts choose in training.
        losses: Balance losses, none that counts k choices of each token; their names differ.
            Without a ``ThresholdLoss`` thresholds stay where they start, at 1/E.
        init_std: Standard deviation of the initial weights.
        seed: Of the initial weights; None draws one from torch's generator.
        layer: Not looked at; every router has one.

    Raises:
        ValueError: For a k outside (0, E], or a loss that does not fit; and in training, where m
            rounds to zero.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: float,
        *,
        scope: Scope = "micro_batch",
        losses: Sequence[BalanceLoss] = (ThresholdLoss(),),
        init_std: float = 0.02,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_experts)
        check_deviation("init_std", init_std)
        if not 0 < k <= num_experts:
            raise UserError(f"k must be above 0 and at most num_experts={num_experts}, got {k}")
        check_scope("batchwise scope", scope)
        _check_losses(losses)
        self.dim, self.num_experts, self.layer = dim, num_experts, layer
        self.k, self.scope, self.init_std, self.losses = k, scope, init_std, tuple(losses)
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.weight_ED = nn.Parameter(empty(num_experts, dim))
        self.threshold_E = nn.Parameter(empty(num_experts))
        if not self.weight_ED.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw ``weight_ED`` from N(0, init_std^2), bounded at two deviations; thresholds 1/E."""
        random.fill_normal_(self.weight_ED, self.init_std, random.fold(seed, "weight"), truncate=2)
        nn.init.constant_(self.threshold_E, 1.0 / self.num_experts)

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``."""
        return "in training, experts choose among all tokens of the group, later ones included"

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, scope={self.scope!r}, "
            f"losses={[loss.name for loss in self.losses]}"
        )

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        sequence_length: int | None = None,
        key: RandomKey | None = None,
        routing: Routing | None = None,
    ) -> Routing:
        """See ``Router.forward``; ``token_ids`` are not looked at."""
        x_TD = without_padding(x_TD, padding_mask)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = wide_logits(x_TD, self.weight_ED)
            score_TE = logits_TE.softmax(dim=1)
            if routing is not None:
                routing = recorded(routing, self.num_experts, "either")
                token_N, expert_NK = routing.token_N, routing.expert_TK
            elif self.training:
                token_N, expert_NK = self._by_batch(score_TE, padding_mask, sequence_length, key)
            else:
                token_N, expert_NK = None, self._by_threshold(score_TE, padding_mask)
            weight_NK, gate_TE, mask_TE = self._weights(score_TE, token_N, expert_NK)
            losses = {}
            if self.training and self.losses:
                everyone_E = torch.arange(self.num_experts, device=x_TD.device)
                evidence = ThresholdEvidence(
                    logits=NoisyLogits(logits_TE, logits_TE),
                    score_TE=score_TE,
                    chosen_TK=torch.where(mask_TE, everyone_E, self.num_experts),
                    gate_TK=gate_TE,
                    padding_mask=padding_mask,
                    sequence_length=sequence_length,
                    population=self.population,
                    key=key,
                    threshold_E=self.threshold_E.to(score_TE.dtype),
                )
                losses = by_name(self.losses, evidence)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_NK,
            weight_TK=weight_NK,
            chosen_TK=expert_NK,
            load_E=count_experts(expert_NK, self.num_experts),
            logits_TE=logits_TE,
            losses=losses,
            token_N=token_N,
        )

    @torch.no_grad()
    def _by_batch(
        self,
        score_TE: Tensor,
        padding_mask: Tensor | None,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> tuple[Tensor, Tensor]:
        groups = groups_of(
            self.population,
            self.scope,
            self.k,
            self.num_experts,
            field="k",
            num_tokens=len(score_TE),
            sequence_length=sequence_length,
            key=key,
        )
        place_GEJ = best_tokens(groups.order.whole(rank_of(score_TE, padding_mask)), groups)
        token_N, expert_N, _ = rows_of(place_GEJ, groups, len(score_TE), padding_mask)
        return decision(token_N), decision(expert_N[:, None])

    @torch.no_grad()
    def _by_threshold(self, score_TE: Tensor, padding_mask: Tensor | None) -> Tensor:
        """``(T, E)``: each expert in its own place, or the sentinel."""
        mask_TE = score_TE > self.threshold_E.to(score_TE.dtype)
        if padding_mask is not None:
            mask_TE = mask_TE & ~padding_mask[:, None]
        everyone_E = torch.arange(self.num_experts, device=score_TE.device)
        return decision(torch.where(mask_TE, everyone_E, self.num_experts))

    def _weights(
        self, score_TE: Tensor, token_N: Tensor | None, expert_NK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores over their sum for each token, by choice and ``(T, E)``; who serves whom, bool."""
        num_tokens, num_experts = score_TE.shape
        if token_N is None:
            token_N = torch.arange(num_tokens, device=score_TE.device)
        token_NK = token_N[:, None].expand_as(expert_NK)
        mask_TE = score_TE.new_zeros(num_tokens, num_experts + 1, dtype=torch.bool)
        ones_NK = torch.ones_like(expert_NK, dtype=torch.bool)
        mask_TE = mask_TE.index_put((token_NK, expert_NK), ones_NK)
        mask_TE = mask_TE[:, :num_experts]
        gate_TE = torch.where(mask_TE, score_TE, 0.0)
        total_T1 = gate_TE.sum(dim=1, keepdim=True)
        gate_TE = gate_TE / total_T1.clamp_min(torch.finfo(gate_TE.dtype).tiny)
        weight_NK = gate_TE[token_NK, expert_NK.clamp_max(num_experts - 1)]
        return torch.where(expert_NK < num_experts, weight_NK, 0.0), gate_TE, mask_TE


def _check_losses(losses: Sequence[BalanceLoss]) -> None:
    check_losses(losses, BatchwiseRouter.__name__)
    for loss in losses:
        if isinstance(loss, LoadBalancingLoss | LoadLoss | DeviceBalanceLoss):
            raise UserError(
                f"{type(loss).__name__} counts k choices of each token, of which there are any "
                "number here; leave it out: ThresholdLoss, ImportanceLoss, ZLoss and the losses on "
                "entropy work"
            )
