"""The definition: the loss of a token from its logits, plainly."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """What a token's loss is made of.

    With logits ``l`` of V classes, target ``t``, ``Z = sum_v exp(l_v)`` and smoothing ``s``::

        (1 - s) (log Z - l_t) + s (log Z - mean_v l_v) + z_loss (log Z)^2

    Attributes:
        label_smoothing: The share s of the target's probability that is spread evenly over all V
            classes (Szegedy et al., arXiv 1512.00567).
        z_loss: Weight of the squared log of the normaliser, which keeps it near 1 (PaLM, arXiv
            2204.02311, section 5).
        ignore_index: A target that is none: such a token has loss 0 and no gradient.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be at least 0 and finite, got {self.z_loss}")


PLAIN = CrossEntropy()
"""No smoothing, no z-loss."""


def token_loss(logits: Tensor, targets: Tensor, kind: CrossEntropy = PLAIN) -> Tensor:
    """The sum of the losses of the tokens that have a target, in nats.

    Args:
        logits: ``(..., V)``.
        targets: int64 ``(...)``.
        kind: What a token's loss is.

    Returns:
        A scalar, float32 or wider; 0 where no token has a target.
    """
    has_target = targets != kind.ignore_index
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))[has_target]
    log_z_N = wide.logsumexp(-1)
    log_p_NV = wide - log_z_N.unsqueeze(-1)
    hard_N = -log_p_NV.gather(-1, targets[has_target].unsqueeze(-1)).squeeze(-1)
    soft_N = -log_p_NV.mean(-1)
    smoothing = kind.label_smoothing
    loss_N = (1 - smoothing) * hard_N + smoothing * soft_N + kind.z_loss * log_z_N.square()
    return loss_N.sum()
