"""Dropout of hidden units inside experts, by numbers that depend on no mesh and no order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh import random
from expertmesh.kernels.activations import HiddenGradient


@dataclass(frozen=True)
class HiddenDropout:
    """Zeroes hidden units with probability ``p`` and divides the others by ``1 - p``.

    Which ones is a function of the row's number, the expert and the hidden unit, both counted over
    the whole model, so slices of the experts agree with the whole and recompute with the first
    pass (Switch's expert dropout, arXiv 2101.03961, 2.4; Srivastava et al., 2014).

    Attributes:
        p: Above 0 and below 1.
        first_expert: The model's number of this rank's expert 0.
        first_unit: The model's number of this rank's hidden unit 0.
    """

    p: float
    first_expert: int = 0
    first_unit: int = 0

    def factor(self, draw_N: Tensor, expert: Tensor | int, like_NF: Tensor) -> Tensor:
        """What hidden units are multiplied by: 0, or ``1 / (1 - p)``.

        Args:
            draw_N: int64 ``(N,)``, the rows' numbers.
            expert: Of each row, ``(N,)``, or of all.
            like_NF: Hidden units, ``(N or more, F)``; gives F and the dtype.

        Returns:
            ``(N or more, F)``, zero past the N rows.
        """
        if not isinstance(expert, Tensor):
            expert = torch.full_like(draw_N, expert)
        key_N = random.bits(draw_N, expert + self.first_expert)
        unit_F = torch.arange(like_NF.shape[1], device=like_NF.device) + self.first_unit
        kept_NF = random.uniform(key_N.unsqueeze(1), unit_F) >= self.p
        factor_NF = kept_NF.to(like_NF.dtype) / (1 - self.p)
        padding = len(like_NF) - len(draw_N)
        return torch.nn.functional.pad(factor_NF, (0, 0, 0, padding)) if padding else factor_NF


def dropped(hidden_NF: Tensor, factor_NF: Tensor | None) -> Tensor:
    """Hidden units times their factors, if there are any."""
    return hidden_NF if factor_NF is None else hidden_NF * factor_NF


def dropped_vjp(hidden: HiddenGradient, factor_NF: Tensor | None) -> HiddenGradient:
    """The same for hidden units with their gradient's rule."""
    if factor_NF is None:
        return hidden
    return HiddenGradient(
        hidden.hidden * factor_NF, lambda grad_NF: hidden.backward(grad_NF * factor_NF)
    )
