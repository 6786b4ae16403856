"""Losses that keep the experts evenly used and the router's logits small.

Each is a small frozen object: what it measures, over which tokens, and how strongly. Papers differ
in all three under the same names; the value at perfect balance (before the coefficient) says which
form is meant.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.kernels.router import counts, router_balance, router_sums, router_z
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_option
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.population import Alone, Population
from expertmesh.routing.scope import Scope, check_scope, scope_size
from expertmesh.routing.selection import top_k


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a loss may look at: one layer's scores and choices for one micro-batch.

    Attributes:
        logits: Router logits with and without noise.
        score_TE: ``(T, E)`` softmax or sigmoid scores, with gradient.
        chosen_TK: int64 ``(T, K)`` choices before capacity; E marks skipped choices and padding.
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

    def total(self, value_TE: Tensor, scope: Scope) -> Tensor:
        """Sums over the valid tokens of each group: ``(T, ...)`` to ``(groups, ...)``.

        A group's tokens may lie on several ranks. Groups are all of the micro-batch's, or, of
        sequences, those that this rank has a part of.
        """
        if self.padding_mask is not None:
            mask = self.padding_mask.view(-1, *[1] * (value_TE.dim() - 1))
            value_TE = torch.where(mask, torch.zeros_like(value_TE), value_TE)
        if scope == "sequence":
            size = scope_size(scope, len(value_TE), self.sequence_length)
            value_GE = value_TE.reshape(-1, size, *value_TE.shape[1:]).sum(dim=1)
            return self.population.sequence_total(value_GE)
        if scope == "micro_batch":
            return self.population.total(value_TE.unsqueeze(0).sum(dim=1))
        order = self.population.arrange(len(value_TE), self.sequence_length, self.key)
        size = scope_size(scope, order.num_tokens, None)
        return self.population.total(order.group_sums(value_TE, size))

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
            kept = self.population.total(kept, copies=self.population.ranks_per_sequence)
            number = self.population.total(number)
        return kept / number.clamp_min(1)

    def num_tokens(self, scope: Scope) -> Tensor:
        """Valid tokens of each group, ``(groups,)``, in the scores' dtype; asked for once."""
        if scope not in self._num_tokens:
            self._num_tokens[scope] = self.total(torch.ones_like(self.score_TE[:, 0]), scope)
        return self._num_tokens[scope]

    def load_and_probability(self, chosen_TK: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """Means over the tokens of each group, ``(groups, E)``: choices of e, probability of e.

        One exchange between ranks, which brings the number of tokens too.
        """
        num_experts = self.num_experts
        split = not isinstance(self.population, Alone) and self.padding_mask is None
        if split and scope == "micro_batch" and counts(self.score_TE):
            sum_1X = router_sums(self.score_TE, chosen_TK, softmax=self.softmax).unsqueeze(0)
            sum_GX = self.population.total(sum_1X)
        else:
            hits_TE = self.spread(torch.ones_like(chosen_TK, dtype=self.score_TE.dtype), chosen_TK)
            ones_T1 = torch.ones_like(self.score_TE[:, :1])
            sum_GX = self.total(torch.cat([hits_TE, self.probability_TE(), ones_T1], 1), scope)
        self._num_tokens[scope] = sum_GX[:, -1].detach()
        mean_GX = sum_GX / sum_GX[:, -1:].detach().clamp_min(1)
        return mean_GX[:, :num_experts].detach(), mean_GX[:, num_experts:-1]


class BalanceLoss(ABC):
    """A loss of one layer's routing. Final subclasses are frozen dataclasses with ``coef``."""

    name: str
    coef: float

    def __post_init__(self) -> None:
        coef = self.coef
        number = isinstance(coef, int | float) and not isinstance(coef, bool)
        if not number or not 0 <= coef < float("inf"):
            raise UserError(
                f"the coefficient of the {self.name} loss must be a number of at least 0, "
                f"got {coef!r}"
            )

    @abstractmethod
    def __call__(self, evidence: Evidence) -> Tensor:
        """The loss with its coefficient, a scalar; 0 without tokens."""


def check_names(losses: Sequence[BalanceLoss]) -> None:
    """Refuse losses of one name, of which ``Routing.losses`` would keep the last.

    Raises:
        ValueError: With the names.
    """
    names = [loss.name for loss in losses]
    if len(set(names)) < len(names):
        raise UserError(f"losses must have different names, got {names}; set name on each")


def by_name(losses: Sequence[BalanceLoss], evidence: Evidence) -> dict[str, Tensor]:
    """``Routing.losses``: each loss's value, with the gradient that its population asks for."""
    return {loss.name: evidence.population.for_training(loss(evidence)) for loss in losses}


def _product(evidence: Evidence, chosen_TK: Tensor, scope: Scope) -> Tensor:
    """sum_e f_e P_e for each group, f_e the choices of e per token."""
    if evidence.is_whole and scope in ("micro_batch", "sequence") and counts(evidence.score_TE):
        size = scope_size(scope, len(chosen_TK), evidence.sequence_length)
        return router_balance(evidence.score_TE, chosen_TK, size, softmax=evidence.softmax)
    fraction_GE, mean_GE = evidence.load_and_probability(chosen_TK, scope)
    return (fraction_GE * mean_GE).sum(dim=1)


def _switch(evidence: Evidence) -> tuple[float, Tensor]:
    """E sum_e f_e P_e, f_e the share of tokens whose first choice is e."""
    return evidence.num_experts, evidence.chosen_TK[:, :1]


def _megablocks(evidence: Evidence) -> tuple[float, Tensor]:
    """E / k sum_e f_e P_e, f_e the choices of e per token."""
    return evidence.num_experts / evidence.k, evidence.chosen_TK


def _huggingface(evidence: Evidence) -> tuple[float, Tensor]:
    """E sum_e f_e P_e, f_e the choices of e per token."""
    return evidence.num_experts, evidence.chosen_TK


def _gshard_paper(evidence: Evidence) -> tuple[float, Tensor]:
    """(1/E) sum_e f_e P_e with first choices, literally as printed."""
    return 1 / evidence.num_experts, evidence.chosen_TK[:, :1]


def _deepseek_v3(evidence: Evidence) -> tuple[float, Tensor]:
    """E / k sum_e f_e P_e, f_e from the top k of scores without the selection bias."""
    return evidence.num_experts / evidence.k, top_k(evidence.score_TE.detach(), evidence.k)


FORMS: dict[str, Callable[[Evidence], tuple[float, Tensor]]] = {
    "switch": _switch,
    "megablocks": _megablocks,
    "huggingface": _huggingface,
    "gshard_paper": _gshard_paper,
    "deepseek_v3": _deepseek_v3,
}
"""Forms of the load-balancing loss: what multiplies ``sum_e f_e P_e``, and the choices f counts.

Their value at perfect balance:

switch: 1 (Switch eq. 4; GShard's and DeepSpeed's code); megablocks: 1 (also DeepSeekMoE, Megatron);
huggingface: k (also flaxformer); gshard_paper: 1/E^2 (GShard Algorithm 1 as printed);
deepseek_v3: 1 (its eq. 17-20; f from scores without bias).
"""


@dataclass(frozen=True, kw_only=True)
class LoadBalancingLoss(BalanceLoss):
    """``E sum_e f_e P_e``: share of choices times mean probability, in one of its forms.

    The share f carries no gradient; it flows through the mean probability P.

    Attributes:
        coef: What multiplies it.
        form: A key of ``FORMS``.
        scope: The tokens of one statistic; groups are averaged. ``"sequence"`` is the sequence-wise
            loss of DeepSeek-V2 and V3.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    form: str = "switch"
    scope: Scope = "micro_batch"
    name: str = "balance"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("balance loss form", self.form, FORMS)
        check_scope("balance loss scope", self.scope)

    def __call__(self, evidence: Evidence) -> Tensor:
        factor, chosen_TK = FORMS[self.form](evidence)
        value_G = _product(evidence, chosen_TK, self.scope)
        return (self.coef * factor) * evidence.mean(value_G, self.scope)


Variance = Literal["population", "unbiased"]
"""``"population"`` divides by E (tensor2tensor), ``"unbiased"`` by E - 1 (Tutel)."""


def squared_cv(value_GE: Tensor, variance: Variance) -> Tensor:
    """Squared coefficient of variation along the last dim: variance / mean^2.

    Args:
        value_GE: ``(groups, E)``.
        variance: See ``Variance``.

    Returns:
        ``(groups,)``; 0 for one expert.
    """
    if value_GE.shape[-1] == 1:
        return torch.zeros_like(value_GE[..., 0])
    mean_G1 = value_GE.mean(dim=-1, keepdim=True)
    freedom = value_GE.shape[-1] - (1 if variance == "unbiased" else 0)
    spread_G = ((value_GE - mean_G1) ** 2).sum(dim=-1) / freedom
    return spread_G / (mean_G1[..., 0] ** 2 + 1e-10)


@dataclass(frozen=True, kw_only=True)
class ImportanceLoss(BalanceLoss):
    """CV^2 of the experts' summed weights (Shazeer et al., arXiv 1701.06538, eq. 6-7).

    0 at balance.

    Attributes:
        coef: What multiplies it.
        of: ``"gates"``, the weights of chosen experts (Shazeer), or ``"probabilities"`` (V-MoE).
        variance: See ``Variance``.
        scope: The tokens of one statistic.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    of: Literal["gates", "probabilities"] = "gates"
    variance: Variance = "population"
    scope: Scope = "micro_batch"
    name: str = "importance"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("importance loss of", self.of, ("gates", "probabilities"))
        check_option("importance loss variance", self.variance, get_args(Variance))
        check_scope("importance loss scope", self.scope)

    def __call__(self, evidence: Evidence) -> Tensor:
        if self.of == "gates":
            value_TE = evidence.spread(evidence.gate_TK, evidence.chosen_TK)
        else:
            value_TE = evidence.probability_TE()
        cv_G = squared_cv(evidence.total(value_TE, self.scope), self.variance)
        return self.coef * evidence.mean(cv_G, self.scope)


def smooth_load(logits: NoisyLogits, k: int) -> Tensor:
    """P(x, i): the chance that expert i is among the k best if its own noise is drawn again.

    Shazeer et al., arXiv 1701.06538, eq. 8-9: Phi((clean_i - kth_excluding(noisy, k, i)) / std_i).

    Args:
        logits: With additive normal noise.
        k: Choices per token.

    Returns:
        ``(T, E)``. For k = E every chance is 1.

    Raises:
        ValueError: If the noise has no standard deviation.
    """
    if logits.std_TE is None:
        raise UserError(
            "the load loss needs additive normal noise on the logits; "
            "set noise to NormalNoise or LearnedNoise"
        )
    if k == logits.clean_TE.shape[1]:
        return torch.ones_like(logits.clean_TE)
    best = logits.noisy_TE.topk(k + 1, dim=1).values
    kth, next_one = best[:, k - 1 : k], best[:, k : k + 1]
    # Without expert i the k-th best is the (k+1)-th of all if i is among the k best, else the k-th.
    threshold_TE = torch.where(logits.noisy_TE >= kth, next_one, kth)
    return torch.special.ndtr((logits.clean_TE - threshold_TE) / logits.std_TE)


@dataclass(frozen=True, kw_only=True)
class LoadVariation(BalanceLoss):
    """CV^2 of the experts' load, however it is estimated. 0 at balance.

    Attributes:
        coef: What multiplies it.
        variance: See ``Variance``.
        scope: The tokens of one statistic.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    variance: Variance = "population"
    scope: Scope = "micro_batch"
    name: str = "load"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("load loss variance", self.variance, get_args(Variance))
        check_scope("load loss scope", self.scope)

    @abstractmethod
    def load_GE(self, evidence: Evidence) -> Tensor:
        """The load of each group of tokens, ``(groups, E)``."""

    def __call__(self, evidence: Evidence) -> Tensor:
        cv_G = squared_cv(self.load_GE(evidence), self.variance)
        return self.coef * evidence.mean(cv_G, self.scope)


@dataclass(frozen=True, kw_only=True)
class LoadLoss(LoadVariation):
    """CV^2 of the smooth load estimate (Shazeer et al., arXiv 1701.06538, eq. 10-11). 0 at balance.

    Attributes are ``LoadVariation``'s.
    """

    def load_GE(self, evidence: Evidence) -> Tensor:
        return evidence.total(smooth_load(evidence.logits, evidence.k), self.scope)


@dataclass(frozen=True, kw_only=True)
class ZLoss(BalanceLoss):
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Attributes:
        coef: What multiplies it; the paper's is 1e-3.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    name: str = "z"

    def __call__(self, evidence: Evidence) -> Tensor:
        logits_TE = evidence.logits.clean_TE
        norm_T = evidence.norm_T
        if norm_T is None and evidence.is_whole and counts(logits_TE):
            return self.coef * router_z(logits_TE)
        square_T = (logits_TE.logsumexp(dim=1) if norm_T is None else norm_T) ** 2
        if evidence.is_whole:
            return self.coef * square_T.mean()
        total_1 = evidence.total(square_T, "micro_batch")
        mean_1 = total_1 / evidence.num_tokens("micro_batch").clamp_min(1)
        return self.coef * mean_1.reshape(())
