"""The order of an epoch: an array, or computed place by place where an array would be too large."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray

from expertmesh.random import fold, uniform

ARRAY_LIMIT = 1 << 24
"""Up to so many samples an order is an array; making one takes about 35 bytes for each."""
_ROUNDS = 6


class Order(Protocol):
    """The number of the sample at each place of an epoch."""

    def __len__(self) -> int:
        """Places."""

    def __getitem__(self, place: int, /) -> int:
        """The sample at a place."""


def shuffled(length: int, key: int) -> Order | NDArray[np.int64]:
    """The numbers below ``length`` in an order that depends on the key only."""
    return permutation(length, key) if length <= ARRAY_LIMIT else KeyedPermutation(length, key)


def permutation(length: int, key: int) -> NDArray[np.int64]:
    """The same as an array.

    It sorts counter-based random numbers, so unlike numpy's shuffles it cannot change with the
    version of a library. Ties keep their order.
    """
    draws = uniform(key, torch.arange(length), torch.float64)
    return torch.argsort(draws, stable=True).numpy()


@final
class KeyedPermutation:
    """A permutation of the numbers below ``length`` that holds no table.

    A Feistel network over the next power of four (Luby and Rackoff, 1988), walked until it comes
    back below ``length`` (Black and Rogaway, 2002).

    Args:
        length: At least 1.
        key: Of the permutation.
    """

    def __init__(self, length: int, key: int) -> None:
        self._length = length
        self._bits = max(1, ((length - 1).bit_length() + 1) // 2)
        self._keys = [fold(key, round_) for round_ in range(_ROUNDS)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int, /) -> int:
        if not 0 <= place < self._length:
            raise IndexError(place)
        value = self._network(place)
        while value >= self._length:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        mask = (1 << self._bits) - 1
        left, right = value >> self._bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (fold(key, right) & mask)
        return left << self._bits | right


@final
class MixedOrder:
    """An epoch of several data sets in fixed shares, place by place.

    Args:
        orders: For each data set, its order of a pass, by the pass's number.
        lengths: Samples of each.
        starts: The number of each one's first sample.
        counts: Places of each in an epoch.
        epoch: Of the mixture; each data set goes on where the last epoch stopped.
        key: Of the order of the places.
    """

    def __init__(
        self,
        orders: Sequence[Callable[[int], Order | NDArray[np.int64]]],
        lengths: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        epoch: int,
        key: int,
    ) -> None:
        # Places jump between the passes of a data set that repeats, so all of them are kept.
        self._orders = [cache(order) for order in orders]
        self._lengths = lengths
        self._starts = starts
        self._counts = counts
        self._ends = list(accumulate(counts))
        self._epoch = epoch
        self._places = shuffled(self._ends[-1], key)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int, /) -> int:
        chosen = int(self._places[place])
        part = int(np.searchsorted(self._ends, chosen, side="right"))
        within = chosen - (self._ends[part] - self._counts[part])
        number, offset = divmod(self._epoch * self._counts[part] + within, self._lengths[part])
        return self._starts[part] + int(self._orders[part](number)[offset])
