"""A model's gradients on this rank, measured and scaled."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expertmesh.shards import local


def gradients_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """What this rank holds of each gradient, to read and to write in place."""
    return [local(param.grad).detach() for param in parameters if param.grad is not None]


@torch.no_grad()
def norms(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each of n gradients, added up in float32 or wider: ``(n,)``, the widest type."""
    wide = torch.float32
    if any(gradient.dtype == torch.float64 for gradient in gradients):
        wide = torch.float64
    if not gradients:
        return torch.zeros(0)
    return torch.stack([torch.linalg.vector_norm(gradient, dtype=wide) for gradient in gradients])


@torch.no_grad()
def scale_(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiply all by one number; nothing is read where it is 1."""
    if factor == 1.0:
        return
    for gradient in gradients:
        # A number of the host is not rounded to the gradient's type first. A scalar tensor of
        # another type, as torch's own clipping has, is converted element by element: four times
        # as slow on a GPU.
        gradient.mul_(factor)


def clip_factor(norm: float, max_norm: float) -> float:
    """What brings a norm down to the largest that is allowed; 1 where it is below, or infinite."""
    return min(1.0, max_norm / (norm + 1e-6)) if math.isfinite(norm) else 1.0
