"""What a data set is to the loader: numbered samples, and an order for each epoch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.order import Order, shuffled
from expertmesh.random import fold

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
        """Sample ``index``, in ``[0, len)``; the same each time."""

    def drawn(self, index: int, key: int) -> Sample:
        """Sample ``index`` with its random choices, if it has any, drawn from ``key``."""
        return self[index]

    def order(self, seed: int, epoch: int) -> Order | NDArray[np.int64]:
        """The sample at each place of an epoch, ``len`` of them: a function of its arguments."""
        return shuffled(len(self), fold(seed, "epoch", epoch))
