"""Losses on the entropy of the router's probabilities, each token's and their mean's.

The pair of LIMoE (Mustafa et al., arXiv 2206.02770): tokens are to be sure of their experts,
and the experts together evenly wanted. Unlike the other balance losses they look at no choice, so
they are smooth. Entropies are in nats. The paper's coefficients belong to its setting of two
modalities; none is taken as a default here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.losses import BalanceLoss
from expertmesh.routing.scope import Scope, check_scope


def entropy(p_XE: Tensor) -> Tensor:
    """``-sum_e p_e log p_e`` over the last dim; ``0 log 0`` is 0 and has a finite gradient."""
    return -(p_XE * p_XE.clamp_min(torch.finfo(p_XE.dtype).tiny).log()).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class LocalEntropyLoss(BalanceLoss):
    """Mean over tokens of ``H(p(x))``: small where each token is sure of its experts.

    From 0 to log E. Alone it drives routers to use few experts; it goes with
    ``GlobalEntropyLoss``.

    Attributes:
        coef: What multiplies it.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    name: str = "local_entropy"

    def __call__(self, evidence: Evidence) -> Tensor:
        entropy_T = entropy(evidence.probability_TE())
        (mean_1,) = evidence.per_token((entropy_T,), "micro_batch")
        return self.coef * mean_1.reshape(())


@dataclass(frozen=True, kw_only=True)
class GlobalEntropyLoss(BalanceLoss):
    """``-H(mean p)``, or ``max(0, threshold - H(mean p))``: small where experts are evenly wanted.

    At balance ``-log E``, or 0 with a threshold. With one, the loss stops pulling once the mean is
    as even as ``exp(threshold)`` equal experts would be.

    Attributes:
        coef: What multiplies it.
        threshold: Lowest entropy that costs nothing, in nats, or None for ``-H``.
        scope: The tokens of one mean; groups are averaged.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    threshold: float | None = None
    scope: Scope = "micro_batch"
    name: str = "global_entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise UserError(
                f"entropy threshold must be above 0 nats, got {self.threshold}; log(E) asks for "
                "perfect balance, None has no threshold"
            )
        check_scope("entropy loss scope", self.scope)

    def __call__(self, evidence: Evidence) -> Tensor:
        (mean_GE,) = evidence.per_token((evidence.probability_TE(),), self.scope)
        value_G = -entropy(mean_GE)
        if self.threshold is not None:
            highest = math.log(evidence.num_experts)
            if self.threshold > highest + 1e-9:
                raise UserError(
                    f"entropy threshold must be at most log(E) = {highest:.4f} for "
                    f"{evidence.num_experts} experts, got {self.threshold}"
                )
            value_G = (self.threshold + value_G).clamp_min(0)
        return self.coef * evidence.mean(value_G, self.scope)
