"""Rules that leave out later choices of a token whose weight is small beside the first."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.random import label
from expertmesh.routing.draw import Draw

_SECOND = label("second choice")


@runtime_checkable
class SkipRule(Protocol):
    """Decides which choices of a token are not carried out although there is room."""

    def __call__(self, gate_TK: Tensor, draw: Draw, *, training: bool) -> Tensor:
        """bool ``(T, K)`` of choices to skip, from weights ``gate_TK``, highest first."""
        ...


@dataclass(frozen=True)
class RandomSecond:
    """Keep a later choice with probability ``min(1, g / threshold)`` of its weight share g.

    GShard (arXiv 2006.16668, Algorithm 1) keeps the second expert if ``2 g2 > U(0, 1)``, which is
    ``threshold=0.5``; mesh-tensorflow uses 0.2. g is the share among the k chosen. Evaluation keeps
    all.

    Attributes:
        threshold: Share from which a choice is always kept.
    """

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f"RandomSecond.threshold must be in (0, 1], got {self.threshold}")

    def __call__(self, gate_TK: Tensor, draw: Draw, *, training: bool) -> Tensor:
        if not training:
            return torch.zeros_like(gate_TK, dtype=torch.bool)
        share_TK = gate_TK / gate_TK.sum(dim=1, keepdim=True)
        chance_TK = draw.uniform(_SECOND, gate_TK.shape[1], gate_TK.dtype)
        skip_TK = share_TK <= self.threshold * chance_TK
        skip_TK[:, 0] = False
        return skip_TK


@dataclass(frozen=True)
class ThresholdSecond:
    """Skip a later choice whose weight is below ``ratio`` times the first (ST-MoE's recipe, 0.2).

    Attributes:
        ratio: Lowest ratio that is kept.
    """

    ratio: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"ThresholdSecond.ratio must be in (0, 1], got {self.ratio}")

    def __call__(self, gate_TK: Tensor, draw: Draw, *, training: bool) -> Tensor:
        return gate_TK < self.ratio * gate_TK[:, :1]
