"""Several data sets as one, by weight."""

from collections.abc import Mapping
from functools import partial
from typing import final

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.dataset import Dataset, Sample
from expertmesh.data.order import MixedOrder, Order
from expertmesh.errors import UserError
from expertmesh.random import fold


@final
class Mixture(Dataset):
    """Samples of several data sets in fixed shares.

    Samples are numbered through: those of the first data set, then those of the second, and so on.
    An epoch has as many places as there are samples, and each data set gets exactly its share of
    them, rounded by largest remainder. A data set walks through its own shuffled passes from one
    epoch of the mixture to the next: one with a small share continues where the last epoch stopped,
    one with a large share repeats. The places of an epoch are shuffled, passes among each other;
    when it ends, no sample of a data set came more than once oftener than another.

    Args:
        parts: Name -> data set, all of one ``seq_len``; none may be empty.
        weights: The same names -> positive numbers; only their ratios count.

    Raises:
        UserError: For a weight that is not positive, an empty data set, or names that differ.
    """

    def __init__(self, parts: Mapping[str, Dataset], weights: Mapping[str, float]) -> None:
        if not parts or parts.keys() != weights.keys():
            raise UserError(f"mix: got weights for {list(weights)} and data sets {list(parts)}")
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"mix[{name!r}] must be a positive number, got {weight}")
            if len(parts[name]) == 0:
                raise UserError(f"mix[{name!r}] has no sample; leave it out or lower seq_len")
        lengths = {part.seq_len for part in parts.values()}
        if len(lengths) > 1:
            raise UserError(f"mix: the data sets must share one seq_len, got {sorted(lengths)}")
        self.seq_len = lengths.pop()
        self.parts = list(parts.values())
        self.packed = all(part.packed for part in self.parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.counts = _shares([weights[name] for name in parts], int(self.starts[-1]))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Sample:
        part, own_index = self._locate(index)
        return part[own_index]

    def drawn(self, index: int, key: int) -> Sample:
        part, own_index = self._locate(index)
        return part.drawn(own_index, key)

    def _locate(self, index: int) -> tuple[Dataset, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part], index - int(self.starts[part])

    def order(self, seed: int, epoch: int) -> Order | NDArray[np.int64]:
        return MixedOrder(
            [partial(part.order, fold(seed, "part", n)) for n, part in enumerate(self.parts)],
            [len(part) for part in self.parts],
            self.starts[:-1].tolist(),
            self.counts,
            epoch=epoch,
            key=fold(seed, "mixture", epoch),
        )


def _shares(weights: list[float], total: int) -> list[int]:
    """Whole numbers in the ratio of the weights that add up to ``total``, none of them zero."""
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    if 0 in counts:
        raise UserError(
            f"mix: the smallest weight gets none of the {total} samples of an epoch; raise it"
        )
    return counts
