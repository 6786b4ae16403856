"""The random numbers of one routing decision."""

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmesh import random
from expertmesh.random import RandomKey


@dataclass(frozen=True)
class Draw:
    """Random numbers per token, a function of (seed, step, layer, global token).

    Without a key each set of numbers takes a seed from torch's default generator; checkpointing
    restores that generator, so recompute draws the same. In evaluation numbers never change.

    Attributes:
        key: Names the numbers of a step, or None.
        layer: Sets layers apart.
        num_tokens: T.
        device: Where the numbers are wanted.
        training: Whether this is a training forward pass.
    """

    key: RandomKey | None
    layer: int
    num_tokens: int
    device: torch.device
    training: bool

    def uniform(self, label: int, width: int, dtype: torch.dtype) -> Tensor:
        """``(T, width)`` numbers in [0, 1) under a label (see ``random.label``)."""
        return random.uniform(self._seed(label), self._index(width), dtype)

    def normal(self, label: int, width: int, dtype: torch.dtype) -> Tensor:
        """``(T, width)`` standard normal numbers under a label (see ``random.label``)."""
        return random.normal(self._seed(label), self._index(width), dtype)

    def bits(self, label: int) -> Tensor:
        """int64 ``(T,)``: a number of 64 random bits for each token."""
        return random.bits(self._seed(label), self._index(1).squeeze(1))

    def _seed(self, label: int) -> Tensor:
        if not self.training:
            seed = torch.zeros((), dtype=torch.int64, device=self.device)
        elif self.key is None:
            seed = torch.randint(0, 1 << 62, (), dtype=torch.int64, device="cpu").to(self.device)
        else:
            seed = self.key.seed.to(self.device)
        return random.fold(seed, self.layer, label)

    def _index(self, width: int) -> Tensor:
        if self.key is None:
            token_T = torch.arange(self.num_tokens, device=self.device)
        else:
            token_T = self.key.token_index.reshape(-1)
        return token_T[:, None] * width + torch.arange(width, device=self.device)
