"""DeepSeek's balance losses over groups of experts, which its papers place on devices.

The groups belong to the model: D equal groups of consecutive experts, whatever ranks hold them.
With ``GroupLimit`` they are its groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.losses import BalanceLoss
from expertmesh.routing.scope import Scope, check_scope


def _check_groups(name: str, num_groups: int, num_experts: int) -> None:
    if num_experts % num_groups:
        raise UserError(
            f"the {name} loss needs num_groups to divide the number of experts {num_experts}, got "
            f"num_groups={num_groups}; set it to a divisor"
        )


def _check_positive(name: str, field: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{field} of the {name} loss must be a whole number above 0, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class DeviceBalanceLoss(BalanceLoss):
    """``sum_d f'_d P'_d`` over groups of experts (DeepSeekMoE, arXiv 2401.06066, 3.3).

    f'_d is the mean over the group of ``E / (K T) * choices of e``, P'_d the sum over the group of
    the mean probability. 1 at balance. DeepSeek-V2 (arXiv 2405.04434) used it with 0.05.

    Attributes:
        coef: What multiplies it.
        num_groups: D; it divides E.
        scope: The tokens of one statistic; groups of tokens are averaged.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    num_groups: int
    scope: Scope = "micro_batch"
    name: str = "device_balance"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self.name, "num_groups", self.num_groups)
        check_scope("device balance loss scope", self.scope)

    def __call__(self, evidence: Evidence) -> Tensor:
        _check_groups(self.name, self.num_groups, evidence.num_experts)
        share_GE, p_GE = evidence.load_and_probability(evidence.chosen_TK, self.scope)
        share_GE = share_GE * (evidence.num_experts / evidence.k)
        share_GD = share_GE.unflatten(1, (self.num_groups, -1)).mean(dim=2)
        p_GD = p_GE.unflatten(1, (self.num_groups, -1)).sum(dim=2)
        return self.coef * evidence.mean((share_GD * p_GD).sum(dim=1), self.scope)


@dataclass(frozen=True, kw_only=True)
class CommunicationBalanceLoss(BalanceLoss):
    """``sum_d f''_d P'_d``: the tokens a group receives (DeepSeek-V2, arXiv 2405.04434, 2.2.3).

    f''_d is ``D / (M T)`` times the tokens that have at least one choice in group d, which is what
    is sent there, however many of its experts a token takes. P'_d as in ``DeviceBalanceLoss``. 1 at
    balance if every token reaches M groups. DeepSeek-V2 used it with 0.02.

    Attributes:
        coef: What multiplies it.
        num_groups: D; it divides E.
        kept: M, the most groups that a token may reach, as ``GroupLimit.kept``.
        scope: The tokens of one statistic; groups of tokens are averaged.
        name: Its key in ``Routing.losses``.
    """

    coef: float
    num_groups: int
    kept: int
    scope: Scope = "micro_batch"
    name: str = "communication_balance"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self.name, "num_groups", self.num_groups)
        _check_positive(self.name, "kept", self.kept)
        if self.kept > self.num_groups:
            raise UserError(
                f"kept of the {self.name} loss must be at most num_groups={self.num_groups}, got "
                f"{self.kept}"
            )
        check_scope("communication balance loss scope", self.scope)

    def __call__(self, evidence: Evidence) -> Tensor:
        _check_groups(self.name, self.num_groups, evidence.num_experts)
        hits_TE = evidence.spread(torch.ones_like(evidence.gate_TK), evidence.chosen_TK)
        reached_TD = hits_TE.unflatten(1, (self.num_groups, -1)).amax(dim=2)
        share_GD, p_GE = evidence.per_token((reached_TD, evidence.probability_TE()), self.scope)
        share_GD = share_GD * (self.num_groups / self.kept)
        p_GD = p_GE.unflatten(1, (self.num_groups, -1)).sum(dim=2)
        return self.coef * evidence.mean((share_GD.detach() * p_GD).sum(dim=1), self.scope)
