"""Two-level gating: groups of experts, then experts in each (arXiv 1701.06538, appendix B)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_deviation, check_kind, check_sizes, check_whole
from expertmesh.routing.decision import decision
from expertmesh.routing.draw import Draw
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.logits import wide_dtype, without_padding
from expertmesh.routing.losses import (
    BalanceLoss,
    LoadLoss,
    LoadVariation,
    ZLoss,
    by_name,
    check_losses,
    smooth_load,
)
from expertmesh.routing.noise import Noise, NoisyLogits
from expertmesh.routing.replay import recorded
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.scope import Scope
from expertmesh.routing.selection import count_experts, top_k

_SECONDARY = random.label("secondary gating")


class _Levels(NamedTuple):
    """Logits of groups ``(T, G)`` and of all experts ``(T, E)``, group by group."""

    primary: NoisyLogits
    secondary: NoisyLogits

    def joint(self, kind: Literal["clean_TE", "noisy_TE"], num_groups: int) -> Tensor:
        """``log(softmax(primary) softmax(secondary))``, ``(T, E)``."""
        log_group_TG = getattr(self.primary, kind).log_softmax(dim=1)
        logits_TE = getattr(self.secondary, kind)
        log_TGM = logits_TE.unflatten(1, (num_groups, -1)).log_softmax(dim=2)
        return (log_group_TG[:, :, None] + log_TGM).flatten(1)


@dataclass(frozen=True, kw_only=True)
class TwoLevelEvidence(Evidence):
    """What a loss may look at where gating has two levels.

    Attributes:
        primary: Logits of groups, ``(T, G)``.
        secondary: Logits of all experts within their groups, ``(T, E)``, group by group.
        k_groups: Groups per token.
        k_each: Experts per token in each of its groups.
    """

    primary: NoisyLogits
    secondary: NoisyLogits
    k_groups: int
    k_each: int


@dataclass(frozen=True, kw_only=True)
class HierarchicalLoadLoss(LoadVariation):
    """CV^2 of the two-level load (Shazeer et al., arXiv 1701.06538, appendix B). 0 at balance.

    ``Load_H(X)_ij = Load_primary(X)_i Load_i(X_i)_j / |X_i|``, both loads smooth estimates, X_i the
    tokens that chose group i. Attributes are ``LoadVariation``'s.
    """

    only_for: ClassVar[str | None] = "HierarchicalRouter"

    def load_GE(self, evidence: Evidence) -> Tensor:
        assert isinstance(evidence, TwoLevelEvidence)
        return two_level_load(evidence, self.scope)


def two_level_load(evidence: TwoLevelEvidence, scope: Scope) -> Tensor:
    """``Load_H`` of each group of tokens, ``(groups, E)``; see ``HierarchicalLoadLoss``."""
    num_tokens, num_groups = evidence.primary.clean_TE.shape
    size = evidence.num_experts // num_groups
    if evidence.secondary.std_TE is None:
        std_TE = None
    else:
        std_TE = evidence.secondary.std_TE.expand(num_tokens, evidence.num_experts)
        std_TE = std_TE.reshape(-1, size)
    inner = NoisyLogits(
        evidence.secondary.clean_TE.reshape(-1, size),
        evidence.secondary.noisy_TE.reshape(-1, size),
        std_TE,
    )
    chance_TGM = smooth_load(inner, evidence.k_each).view(num_tokens, num_groups, size)
    hits_TE = evidence.spread(torch.ones_like(evidence.gate_TK), evidence.chosen_TK)
    member_TG = (hits_TE.view(num_tokens, num_groups, size).sum(dim=2) > 0).to(hits_TE.dtype)
    primary_TG = smooth_load(evidence.primary, evidence.k_groups)
    within_TGM = chance_TGM * member_TG[:, :, None]
    primary_XG, members_XG, within_XGM = evidence.totals((primary_TG, member_TG, within_TGM), scope)
    load_XGM = (primary_XG / members_XG.clamp_min(1))[:, :, None] * within_XGM
    return load_XGM.flatten(1)


@final
class HierarchicalRouter(Router):
    """``sum_i sum_j G(x)_i G_i(x)_j E_ij(x)`` (Shazeer et al., arXiv 1701.06538, appendix B).

    G takes the best groups of experts and weighs them by a softmax over those taken; G_i does the
    same among the experts of group i. K is ``k_groups * k_each``, weights sum to 1. The paper has
    two of each, learned noise on both levels and zeros to start with: ``LearnedNoise(dim,
    num_groups)``, ``LearnedNoise(dim, num_experts)``, ``init_std=0``.

    ``ImportanceLoss`` on it is the paper's two-level importance, as weights are products already;
    the two-level load is ``HierarchicalLoadLoss``. The logits it reports are logarithms of the
    product of both softmaxes.

    Args:
        dim: D.
        num_experts: E, of all groups.
        num_groups: Equal groups of consecutive experts.
        k_groups: Groups per token.
        k_each: Experts per token in each of its groups.
        primary_noise: On the logits of groups, or None.
        secondary_noise: On the logits of experts, or None.
        losses: Balance losses; their names differ.
        init_std: Standard deviation of the initial weights; 0 starts them at zero.
        seed: Of the initial weights; None draws one from torch's generator.
        layer: Index that sets this router's draws apart from other layers'.

    Raises:
        ValueError: For arguments that don't fit together, naming what to set.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_groups: int,
        k_groups: int = 2,
        k_each: int = 2,
        primary_noise: Noise | None = None,
        secondary_noise: Noise | None = None,
        losses: Sequence[BalanceLoss] = (),
        init_std: float = 0.02,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(dim, num_experts, num_groups, k_groups, k_each, losses)
        check_deviation("init_std", init_std)
        _check_noise("primary_noise", primary_noise, dim, num_groups)
        _check_noise("secondary_noise", secondary_noise, dim, num_experts)
        self.dim, self.num_experts, self.num_groups = dim, num_experts, num_groups
        self.k_groups, self.k_each, self.k = k_groups, k_each, k_groups * k_each
        self.layer, self.init_std, self.losses = layer, init_std, tuple(losses)
        self.primary_noise, self.secondary_noise = primary_noise, secondary_noise
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.weight_GD = nn.Parameter(empty(num_groups, dim))
        self.weight_ED = nn.Parameter(empty(num_experts, dim))
        if not self.weight_ED.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        if self.primary_noise is None and self.secondary_noise is None:
            return None
        return "noise is drawn for each token; set primary_noise=None and secondary_noise=None"

    def reset_parameters(self, seed: int) -> None:
        """Draw both levels' weights from N(0, init_std^2), bounded at two standard deviations."""
        for name, weight in (("primary", self.weight_GD), ("secondary", self.weight_ED)):
            random.fill_normal_(weight, self.init_std, random.fold(seed, name), truncate=2)
        for noise in (self.primary_noise, self.secondary_noise):
            if noise is not None:
                noise.reset_parameters(random.fold(seed, "noise"))

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, num_groups={self.num_groups}, "
            f"k_groups={self.k_groups}, k_each={self.k_each}"
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
            levels = self._levels(x_TD, key)
            if routing is None:
                expert_TK = chosen_TK = self._choose(levels, padding_mask)
            else:
                routing = recorded(routing, self.num_experts)
                expert_TK, chosen_TK = routing.expert_TK, routing.chosen_TK
            gate_TK = self._gates(levels, chosen_TK)
            logits_TE = levels.joint("clean_TE", self.num_groups)
            losses = {}
            if self.training and self.losses:
                noisy_TE = levels.joint("noisy_TE", self.num_groups)
                evidence = TwoLevelEvidence(
                    logits=NoisyLogits(logits_TE, noisy_TE),
                    score_TE=noisy_TE.exp(),
                    chosen_TK=chosen_TK,
                    gate_TK=gate_TK,
                    padding_mask=padding_mask,
                    sequence_length=sequence_length,
                    population=self.population,
                    key=key,
                    primary=levels.primary,
                    secondary=levels.secondary,
                    k_groups=self.k_groups,
                    k_each=self.k_each,
                )
                losses = by_name(self.losses, evidence)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_TK,
            weight_TK=torch.where(expert_TK < self.num_experts, gate_TK, 0.0),
            chosen_TK=chosen_TK,
            load_E=count_experts(expert_TK, self.num_experts),
            logits_TE=logits_TE,
            losses=losses,
        )

    def _levels(self, x_TD: Tensor, key: RandomKey | None) -> _Levels:
        x_TD = x_TD.to(wide_dtype(x_TD, self.weight_ED))
        # Another layer's name, or both levels would draw the same numbers.
        inner = random.fold(self.layer, _SECONDARY)
        return _Levels(
            self._level(x_TD, self.weight_GD, self.primary_noise, key, self.layer),
            self._level(x_TD, self.weight_ED, self.secondary_noise, key, inner),
        )

    def _level(
        self, x_TD: Tensor, weight_ED: Tensor, noise: Noise | None, key: RandomKey | None, name: int
    ) -> NoisyLogits:
        weight_ED = weight_ED.to(x_TD.dtype)
        if self.training and noise is not None:
            draw = Draw(key, name, len(x_TD), x_TD.device, self.training)
            logits: NoisyLogits = noise(x_TD, weight_ED, draw)
            return logits
        logits_TE = x_TD @ weight_ED.T
        return NoisyLogits(logits_TE, logits_TE)

    @torch.no_grad()
    def _choose(self, levels: _Levels, padding_mask: Tensor | None) -> Tensor:
        """The best experts of the best groups, group by group: ``(T, k_groups * k_each)``."""
        group_TI = top_k(levels.primary.noisy_TE, self.k_groups)
        size = self.num_experts // self.num_groups
        logits_TGM = levels.secondary.noisy_TE.unflatten(1, (self.num_groups, size))
        logits_TIM = logits_TGM.gather(1, group_TI[:, :, None].expand(-1, -1, size))
        member_TIJ = top_k(logits_TIM.flatten(0, 1), self.k_each).unflatten(0, group_TI.shape)
        expert_TK = (group_TI[:, :, None] * size + member_TIJ).flatten(1)
        if padding_mask is not None:
            expert_TK = torch.where(padding_mask[:, None], self.num_experts, expert_TK)
        return decision(expert_TK)

    def _gates(self, levels: _Levels, expert_TK: Tensor) -> Tensor:
        """Softmax over the groups taken times softmax over the experts taken in each."""
        known_TK = expert_TK.clamp_max(self.num_experts - 1)
        group_TI = known_TK[:, :: self.k_each] // (self.num_experts // self.num_groups)
        gate_TI = levels.primary.noisy_TE.gather(1, group_TI).softmax(dim=1)
        logits_TIJ = levels.secondary.noisy_TE.gather(1, known_TK)
        logits_TIJ = logits_TIJ.unflatten(1, (self.k_groups, self.k_each))
        gate_TK = (gate_TI[:, :, None] * logits_TIJ.softmax(dim=2)).flatten(1)
        return torch.where(expert_TK < self.num_experts, gate_TK, 0.0)


def _check_noise(field: str, noise: Noise | None, dim: int, num_logits: int) -> None:
    check_kind(field, noise, Noise, "NormalNoise()")
    if noise is not None:
        noise.check(field, dim, num_logits)


def _check(
    dim: int,
    num_experts: int,
    num_groups: int,
    k_groups: int,
    k_each: int,
    losses: Sequence[BalanceLoss],
) -> None:
    check_sizes(dim, num_experts)
    check_whole(num_groups=num_groups, k_groups=k_groups, k_each=k_each)
    if num_groups < 1 or num_experts % num_groups:
        raise UserError(
            f"num_groups must divide num_experts={num_experts}, got {num_groups}; set it to a "
            "divisor"
        )
    limits = (("k_groups", k_groups, num_groups), ("k_each", k_each, num_experts // num_groups))
    for field, value, most in limits:
        if not 1 <= value <= most:
            raise UserError(f"{field} must be between 1 and {most}, got {value}")
        if value == 1 and most > 1:
            raise UserError(
                f"{field}=1 makes every weight of its level 1, so the level gets no gradient from "
                f"the task; set {field} to 2 or more"
            )
    check_losses(losses, HierarchicalRouter.__name__)
    for loss in losses:
        if isinstance(loss, LoadLoss | ZLoss):
            raise UserError(
                f"{type(loss).__name__} is for logits of one level; leave it out, or use "
                "HierarchicalLoadLoss for the load"
            )
