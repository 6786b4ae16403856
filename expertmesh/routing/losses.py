"""Losses that keep the experts evenly used and the router's logits small.

Each is a small frozen object: what it measures, over which tokens, and how strongly. Papers differ
in all three under the same names; the value at perfect balance (before the coefficient) says which
form is meant.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.kernels.router import counts, router_balance, router_z
from expertmesh.routing.checks import check_option
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.scope import Scope, check_scope, scope_size
from expertmesh.routing.selection import top_k


class BalanceLoss(ABC):
    """A loss of one layer's routing. Final subclasses are frozen dataclasses with ``coef``.

    ``only_for`` names the one router that has what the loss looks at, if others have not.
    """

    name: str
    coef: float
    only_for: ClassVar[str | None] = None

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


def check_losses(losses: Sequence[BalanceLoss], router: str) -> None:
    """Refuse what is no sequence of losses, of different names, that a router can serve.

    Args:
        losses: What was given.
        router: The name of the router's class.

    Raises:
        ValueError: With the loss or the names.
    """
    if not isinstance(losses, Sequence):
        raise UserError(
            f"losses must be a sequence of balance losses, got {losses!r}; set losses=(loss,)"
        )
    for loss in losses:
        if not isinstance(loss, BalanceLoss):
            raise UserError(
                f"losses must be balance losses such as LoadBalancingLoss(coef=0.01), got {loss!r}"
            )
        if loss.only_for not in (None, router):
            raise UserError(
                f"{type(loss).__name__} is for {loss.only_for} alone, got it in {router}; leave it "
                "out"
            )
    # Of losses of one name ``Routing.losses`` would keep the last.
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


Importance = Literal["gates", "probabilities", "clean_probabilities"]


@dataclass(frozen=True, kw_only=True)
class ImportanceLoss(BalanceLoss):
    """CV^2 of the experts' summed weights (Shazeer et al., arXiv 1701.06538, eq. 6-7).

    0 at balance.

    Attributes:
        coef: What multiplies it.
        of: ``"gates"``, the weights of chosen experts (Shazeer); ``"probabilities"``, the scores of
            all experts over their sum; or ``"clean_probabilities"``, the softmax of the logits
            without noise (V-MoE).
        variance: See ``Variance``.
        scope: The tokens of one statistic.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    of: Importance = "gates"
    variance: Variance = "population"
    scope: Scope = "micro_batch"
    name: str = "importance"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("importance loss of", self.of, get_args(Importance))
        check_option("importance loss variance", self.variance, get_args(Variance))
        check_scope("importance loss scope", self.scope)

    def __call__(self, evidence: Evidence) -> Tensor:
        if self.of == "gates":
            value_TE = evidence.spread(evidence.gate_TK, evidence.chosen_TK)
        elif self.of == "clean_probabilities":
            value_TE = evidence.logits.clean_TE.softmax(dim=1)
        else:
            value_TE = evidence.probability_TE()
        cv_G = squared_cv(evidence.total(value_TE, self.scope), self.variance)
        return self.coef * evidence.mean(cv_G, self.scope)


Threshold = Literal["kth_of_others", "kth"]
"""What an expert must exceed: the k-th best logit of the others, or the k-th best of all."""


def smooth_load(logits: NoisyLogits, k: int, threshold: Threshold = "kth_of_others") -> Tensor:
    """P(x, i): the chance that expert i is among the k best if its own noise is drawn again.

    Shazeer et al., arXiv 1701.06538, eq. 8-9: Phi((clean_i - kth_excluding(noisy, k, i)) / std_i).
    V-MoE (arXiv 2106.05974) compares with the k-th best of all, expert i included: that is the same
    for experts that were not chosen, and too low a chance for those that were.

    Args:
        logits: With additive normal noise.
        k: Choices per token.
        threshold: See ``Threshold``.

    Returns:
        ``(T, E)``. For k = E every chance is 1, unless the threshold is ``"kth"``.

    Raises:
        ValueError: If the noise has no standard deviation.
    """
    if logits.std_TE is None:
        raise UserError(
            "the load loss needs additive normal noise on the logits; "
            "set noise to NormalNoise or LearnedNoise"
        )
    num_experts = logits.clean_TE.shape[1]
    if threshold == "kth_of_others" and k == num_experts:
        return torch.ones_like(logits.clean_TE)
    best = logits.noisy_TE.topk(min(k + 1, num_experts), dim=1).values
    threshold_TE = kth_T1 = best[:, k - 1 : k]
    if threshold == "kth_of_others":
        # Without i the k-th best is the (k+1)-th of all if i is among the k best, else the k-th.
        threshold_TE = torch.where(logits.noisy_TE >= kth_T1, best[:, k:], kth_T1)
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

    Attributes are ``LoadVariation``'s, and:

    Attributes:
        threshold: ``"kth_of_others"`` (Shazeer) or ``"kth"`` (V-MoE); see ``smooth_load``.
    """

    threshold: Threshold = "kth_of_others"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_option("load loss threshold", self.threshold, get_args(Threshold))

    def load_GE(self, evidence: Evidence) -> Tensor:
        chance_TE = smooth_load(evidence.logits, evidence.k, self.threshold)
        return evidence.total(chance_TE, self.scope)


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
        (mean_1,) = evidence.per_token((square_T,), "micro_batch")
        return self.coef * mean_1.reshape(())
