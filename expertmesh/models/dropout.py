"""Dropout that drops the same on every mesh and under recompute."""

import torch
from torch import Tensor, nn

from expertmesh.random import RandomKey, label
from expertmesh.routing.draw import Draw


class Dropout(nn.Module):
    """Zeroes elements with probability ``p`` in training, and divides the others by ``1 - p``.

    Which ones is a function of (seed, step, layer, token, channel), so that neither the number of
    ranks nor the micro-batch decides it (Srivastava et al., 2014, is the method).

    Args:
        p: From 0 to below 1; 0 does nothing.
        layer: Sets this layer's draws apart.
        name: Sets places of one layer apart.
    """

    def __init__(self, p: float, layer: int, name: str) -> None:
        super().__init__()
        self.p = p
        self.layer = layer
        # Here, since hashing a name cannot be traced by torch.compile.
        self._label = label(f"dropout {name}")

    def forward(self, x_BSD: Tensor, key: RandomKey | None) -> Tensor:
        """Args: ``x_BSD`` ``(B, S, D)`` and the step's key. Returns the same shape."""
        if not self.training or self.p == 0:
            return x_BSD
        batch, seq_len, dim = x_BSD.shape
        draw = Draw(key, self.layer, batch * seq_len, x_BSD.device, self.training)
        kept_BSD = draw.uniform(self._label, dim, torch.float32).view_as(x_BSD) >= self.p
        return torch.where(kept_BSD, x_BSD / (1 - self.p), 0)

    def extra_repr(self) -> str:
        return f"p={self.p}"
