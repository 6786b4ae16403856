"""What a data set is to the loader: numbered samples, and an order for each epoch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from expertmesh.random import fold, uniform

IGNORE = -100
"""Target of a position that has none; ``torch.nn.functional.cross_entropy`` leaves it out."""


@dataclass(frozen=True)
class Sample:
    """One row of a batch, S = ``seq_len``.

    Attributes:
        tokens_S: ``(S,)`` int64.
        targets_S: ``(S,)`` int64, the token that follows each one, ``IGNORE`` where none does.
        num_tokens: Positions before the padding.
    """

    tokens_S: NDArray[np.int64]
    targets_S: NDArray[np.int64]
    num_tokens: int


class Dataset(ABC):
    """A fixed number of samples of one length."""

    seq_len: int
    """S, tokens of a sample."""
    packed: bool
    """True if no sample has padding."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample ``index``, in ``[0, len)``."""

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The sample at each place of an epoch, ``(len,)``: a function of its arguments only."""
        return permutation(len(self), fold(seed, "epoch", epoch))


def permutation(length: int, key: int) -> NDArray[np.int64]:
    """The numbers below ``length`` in an order that depends on the key only.

    It sorts counter-based random numbers, so unlike numpy's shuffles it cannot change with the
    version of a library. Ties keep their order.
    """
    draws = uniform(key, torch.arange(length), torch.float64)
    return torch.argsort(draws, stable=True).numpy()
