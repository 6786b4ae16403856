"""Token choice: what follows once a router has logits for every token and expert."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from expertmesh.errors import UserError, nearest
from expertmesh.kernels.dtypes import without_autocast
from expertmesh.kernels.router import router_choose, router_gates, router_select
from expertmesh.random import RandomKey
from expertmesh.routing.bias import SelectionBias
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.checks import check_kind, check_sizes
from expertmesh.routing.decision import decision
from expertmesh.routing.draw import Draw
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.group_limit import GroupLimit
from expertmesh.routing.logits import without_padding
from expertmesh.routing.losses import BalanceLoss, by_name, check_losses
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.population import Alone, Arrangement
from expertmesh.routing.replay import recorded
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.sampling import SAMPLINGS, Sampling
from expertmesh.routing.second_choice import RandomSecond, SkipRule
from expertmesh.routing.selection import count_experts, top_k

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(dim=-1),
    "sigmoid": torch.sigmoid,
}

Renormalize = Literal["no", "chosen", "kept"]


class _Scored(NamedTuple):
    """Scores, the k best and their gates; what is known with them already.

    That may be the load that the k best ask for, and logsumexp of the logits that were scored.
    """

    chosen_TK: Tensor
    score_TE: Tensor
    gate_TK: Tensor
    load_E: Tensor | None = None
    norm_T: Tensor | None = None


class _Admitted(NamedTuple):
    """Choices that are carried out, the load they ask for, and those that overflowed."""

    expert_TK: Tensor
    load_E: Tensor
    dropped_TK: Tensor | None
    most_per_expert: int | None


class TokenChoice(Router):
    """Each token takes the k experts that score highest; subclasses say what the logits are.

    Their arguments of the same names are described with ``TopKRouter``.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        layer: Index that sets this router's draws apart from other layers'.

    Raises:
        ValueError: For arguments that don't fit together, naming what to set.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score: Literal["softmax", "sigmoid"],
        renormalize: Renormalize,
        scale: float,
        skip: SkipRule | None,
        capacity: Capacity | None,
        bias: SelectionBias | None,
        group_limit: GroupLimit | None,
        losses: Sequence[BalanceLoss],
        layer: int,
        sampling: Sampling = "no",
    ) -> None:
        super().__init__()
        _check(dim, num_experts, k, score, renormalize)
        check_losses(losses, type(self).__name__)
        _check_kinds(skip, capacity, bias, group_limit)
        _check_sampling(sampling, k, bias, group_limit)
        if bias is not None:
            bias.check(num_experts)
        if group_limit is not None:
            group_limit.check(num_experts, k)
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise UserError(f"scale must be a finite number above 0, got {scale!r}; 1 is none")
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, k, layer
        self.score, self.renormalize, self.scale = score, renormalize, scale
        self.skip, self.capacity, self.group_limit = skip, capacity, group_limit
        self.bias, self.sampling = bias, sampling
        self.losses = tuple(losses)

    @abstractmethod
    def _logits(self, x_TD: Tensor, draw: Draw) -> NoisyLogits:
        """Logits in float32 or wider, ``(T, E)``; noise in training only."""

    def _fused(self, x_TD: Tensor) -> bool:
        """Whether kernels take over from the logits on."""
        return False

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``; only a capacity can leak, by the order in which it is given out."""
        return None if self.capacity is None else self.capacity.leaks(self.k)

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        if self.sampling != "no":
            return "choices are drawn for each token; set sampling='no'"
        if isinstance(self.skip, RandomSecond):
            return "later choices are kept by chance for each token; set skip=None"
        return None

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, score={self.score}, "
            f"renormalize={self.renormalize}, scale={self.scale}, capacity={self.capacity}, "
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
        if routing is not None:
            routing = recorded(routing, self.num_experts)
        x_TD = without_padding(x_TD, padding_mask)
        draw = Draw(key, self.layer, len(x_TD), x_TD.device, self.training)
        with without_autocast(x_TD.device.type):
            logits = self._logits(x_TD, draw)
            score = self._score_fused if self._fused(x_TD) else self._score
            chosen_TK, score_TE, gate_TK, load_E, norm_T = score(
                logits, padding_mask, routing, draw
            )
            if routing is None:
                admitted = self._admit(
                    chosen_TK, score_TE.detach(), gate_TK.detach(), load_E, sequence_length, draw
                )
            else:
                admitted = _Admitted(
                    routing.expert_TK, routing.load_E, routing.dropped_TK, routing.most_per_expert
                )
            losses = {}
            if self.training and self.losses:
                evidence = Evidence(
                    logits=logits,
                    score_TE=score_TE,
                    chosen_TK=chosen_TK,
                    gate_TK=gate_TK,
                    padding_mask=padding_mask,
                    sequence_length=sequence_length,
                    population=self.population,
                    key=key,
                    norm_T=norm_T if logits.clean_TE is logits.noisy_TE else None,
                    softmax=self.score == "softmax",
                )
                losses = by_name(self.losses, evidence)
        if self.bias is not None:
            self.bias.count(chosen_TK)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=admitted.expert_TK,
            weight_TK=self._weights(gate_TK, chosen_TK, admitted.expert_TK),
            chosen_TK=chosen_TK,
            load_E=admitted.load_E,
            dropped_TK=admitted.dropped_TK,
            logits_TE=logits.clean_TE,
            losses=losses,
            most_per_expert=admitted.most_per_expert,
        )

    def _score(
        self, logits: NoisyLogits, padding_mask: Tensor | None, routing: Routing | None, draw: Draw
    ) -> _Scored:
        logits_TE = logits.noisy_TE
        score_TE = SCORES[self.score](logits_TE)
        if routing is None:
            chosen_TK = self._choose(score_TE, logits_TE, padding_mask, draw)
        else:
            chosen_TK = routing.chosen_TK
        return _Scored(chosen_TK, score_TE, self._gates(score_TE, chosen_TK))

    def _score_fused(
        self, logits: NoisyLogits, padding_mask: Tensor | None, routing: Routing | None, draw: Draw
    ) -> _Scored:
        """``_score`` by kernels. The gates are those of the decision, which may be a kept one."""
        logits_TE = logits.noisy_TE
        rule = {"sigmoid": self.score == "sigmoid", "renormalize": self.renormalize == "chosen"}
        by_score = self.bias is None and self.group_limit is None and not self._samples
        if routing is not None:
            chosen_TK = routing.chosen_TK
        elif not by_score:
            score_TE = SCORES[self.score](logits_TE.detach())
            chosen_TK = self._choose(score_TE, logits_TE.detach(), padding_mask, draw)
        elif padding_mask is None and not torch.is_grad_enabled():  # no backward, nothing to keep
            return _Scored(*router_select(logits_TE, self.k, **rule, scale=self.scale))
        else:
            chosen_TK = router_choose(logits_TE, self.k, rule["sigmoid"])
            chosen_TK = self._decided(chosen_TK, padding_mask)
        gates = router_gates(logits_TE, chosen_TK, **rule, scale=self.scale, factors=logits.factors)
        return _Scored(chosen_TK, *gates)

    @property
    def _samples(self) -> bool:
        return self.training and self.sampling != "no"

    @torch.no_grad()
    def _choose(
        self, score_TE: Tensor, logits_TE: Tensor, padding_mask: Tensor | None, draw: Draw
    ) -> Tensor:
        if self._samples:
            score_TE = SAMPLINGS[self.sampling](logits_TE, draw)
        if self.bias is not None:
            score_TE = score_TE + self.bias.bias_E
        if self.group_limit is not None:
            score_TE = self.group_limit.mask(score_TE)
        return self._decided(top_k(score_TE, self.k), padding_mask)

    def _decided(self, chosen_TK: Tensor, padding_mask: Tensor | None) -> Tensor:
        if padding_mask is not None:
            chosen_TK = torch.where(padding_mask[:, None], self.num_experts, chosen_TK)
        return decision(chosen_TK)

    def _gates(self, score_TE: Tensor, chosen_TK: Tensor) -> Tensor:
        """What each choice weighs before any is skipped or dropped."""
        gate_TK = self._chosen_scores(score_TE, chosen_TK)
        if self.renormalize == "chosen":
            gate_TK = _over_sum(gate_TK)
        return self.scale * gate_TK

    def _chosen_scores(self, score_TE: Tensor, chosen_TK: Tensor) -> Tensor:
        score_TK = score_TE.gather(1, chosen_TK.clamp_max(self.num_experts - 1))
        return torch.where(chosen_TK < self.num_experts, score_TK, 0.0)

    @torch.no_grad()
    def _admit(
        self,
        chosen_TK: Tensor,
        score_TE: Tensor,
        gate_TK: Tensor,
        load_E: Tensor | None,
        sequence_length: int | None,
        draw: Draw,
    ) -> _Admitted:
        wanted_TK = chosen_TK
        if self.skip is not None:
            skipped_TK = self.skip(gate_TK, draw, training=self.training)
            wanted_TK = decision(torch.where(skipped_TK, self.num_experts, chosen_TK))
        if load_E is None or self.skip is not None:
            load_E = count_experts(wanted_TK, self.num_experts)
        if self.capacity is None:
            return _Admitted(wanted_TK, load_E, None, None)
        order = self._order(len(chosen_TK), sequence_length, draw.key)
        by_score = self.capacity.order == "priority"
        worth_TK = self._chosen_scores(score_TE, chosen_TK) if by_score else gate_TK
        expert_TK = self.capacity.drop(
            wanted_TK, worth_TK, self.num_experts, training=self.training, order=order, draw=draw
        )
        expert_TK = decision(expert_TK)
        most = self.capacity.most_per_expert(
            order, self.num_experts, self.k, training=self.training
        )
        return _Admitted(expert_TK, load_E, wanted_TK != expert_TK, most)

    def _order(
        self, num_tokens: int, sequence_length: int | None, key: RandomKey | None
    ) -> Arrangement:
        """Of the tokens that share slots: this rank's, where sequences lie whole on ranks."""
        population = self.population
        if self.capacity is not None and self.capacity.scope == "sequence":
            population = population if population.ranks_per_sequence > 1 else Alone()
        return population.arrange(num_tokens, sequence_length, key)

    def _weights(self, gate_TK: Tensor, chosen_TK: Tensor, expert_TK: Tensor) -> Tensor:
        """Gates of the choices that are carried out, zero elsewhere."""
        weight_TK = gate_TK
        if expert_TK is not chosen_TK:  # else gates are zero wherever nothing was chosen
            weight_TK = torch.where(expert_TK < self.num_experts, gate_TK, 0.0)
        return self.scale * _over_sum(weight_TK) if self.renormalize == "kept" else weight_TK


def _over_sum(gate_TK: Tensor) -> Tensor:
    """Each row divided by its sum; a row of zeros stays zero."""
    total_T1 = gate_TK.sum(dim=1, keepdim=True)
    return gate_TK / total_T1.clamp_min(torch.finfo(gate_TK.dtype).tiny)


def _check(
    dim: int,
    num_experts: int,
    k: int,
    score: str,
    renormalize: str,
) -> None:
    check_sizes(dim, num_experts, k)
    if score not in SCORES:
        raise UserError(
            f"score must be one of {', '.join(SCORES)}, got {score!r}" + nearest(score, SCORES)
        )
    if renormalize not in ("no", "chosen", "kept"):
        raise UserError(f"renormalize must be 'no', 'chosen' or 'kept', got {renormalize!r}")
    if k == 1 and renormalize != "no":
        raise UserError(
            f"renormalize={renormalize!r} with k=1 makes every weight 1, so the router gets no "
            "gradient from the task; set renormalize='no' or k >= 2"
        )


def _check_kinds(
    skip: SkipRule | None,
    capacity: Capacity | None,
    bias: SelectionBias | None,
    group_limit: GroupLimit | None,
) -> None:
    check_kind("skip", skip, SkipRule, "ThresholdSecond(0.2)")
    check_kind("capacity", capacity, Capacity, "Capacity(factor=1.25)")
    check_kind("bias", bias, SelectionBias, "SelectionBias(num_experts)")
    check_kind("group_limit", group_limit, GroupLimit, "GroupLimit(num_groups=8, kept=4)")


def _check_sampling(
    sampling: str, k: int, bias: SelectionBias | None, group_limit: GroupLimit | None
) -> None:
    known = ("no", *SAMPLINGS)
    if sampling not in known:
        raise UserError(
            f"sampling must be one of {', '.join(known)}, got {sampling!r}"
            + nearest(sampling, known)
        )
    if sampling == "second" and k == 1:
        raise UserError(
            "sampling='second' draws the choices after the first, and k=1 has none; set k to 2 or "
            "more, or sampling='all'"
        )
    if sampling != "no" and (bias is not None or group_limit is not None):
        raise UserError(
            f"sampling={sampling!r} draws by the logits alone; leave bias and group_limit out, or "
            "set sampling='no'"
        )
