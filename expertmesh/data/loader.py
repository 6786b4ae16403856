"""Batches as a function of the step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from expertmesh.data.dataset import IGNORE, Dataset
from expertmesh.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows of token ids, on the CPU.

    Attributes:
        tokens_BS: ``(B, S)`` int64.
        targets_BS: ``(B, S)`` int64, the next token, -100 where there is none.
        padding_mask_BS: ``(B, S)`` bool, True at padding; None where the data set has none.
        sample_index_B: ``(B,)`` int64, each row's number in the data set.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    padding_mask_BS: Tensor | None
    sample_index_B: Tensor

    @property
    def num_targets(self) -> int:
        """Positions that have a target: what a summed loss is divided by."""
        return int((self.targets_BS != IGNORE).sum())

    def rows(self, start: int, stop: int) -> "Batch":
        """Some rows: a micro-batch, or a rank's share."""
        mask = self.padding_mask_BS
        return Batch(
            self.tokens_BS[start:stop],
            self.targets_BS[start:stop],
            None if mask is None else mask[start:stop],
            self.sample_index_B[start:stop],
        )


@final
class Loader:
    """Endless shuffled batches, each a pure function of (data set, seed, batch size, step).

    Epoch after epoch the data set gives an order of its samples; laid end to end, step ``n`` takes
    places ``n * batch_size`` onwards. So each sample comes once per epoch (in a mixture: in its
    share), a batch may span two epochs, and to resume is to ask for the next step: there is no
    state to save.

    torchdata's StatefulDataLoader is not used: its state belongs to one rank and one number of
    workers, and loading it elsewhere fails. The place in the data is one global number here, so a
    run continues on any number of ranks; reading a memory-mapped row needs no worker either.

    Args:
        dataset: Must have at least one sample.
        batch_size: Rows of the global batch.
        seed: Of the order of samples.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if len(dataset) == 0:
            raise UserError("the data set has no sample; give more text or set a lower seq_len")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        # A batch seldom touches more than two epochs; an order is 8 bytes a sample.
        self._order = lru_cache(maxsize=2)(lambda epoch: dataset.order(seed, epoch))

    def batch(self, step: int) -> Batch:
        """The global batch of a step, counted from 0."""
        if step < 0:
            raise UserError(f"step must be at least 0, got {step}")
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        length = len(self.dataset)
        return collate(
            self.dataset, [int(self._order(place // length)[place % length]) for place in places]
        )

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """Batches from a step on, without end."""
        while True:
            yield self.batch(step)
            step += 1


def in_order(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Every sample once, unshuffled: for evaluation. The last batch may be smaller."""
    for start in range(0, len(dataset), batch_size):
        yield collate(dataset, range(start, min(start + batch_size, len(dataset))))


def collate(dataset: Dataset, index: Sequence[int]) -> Batch:
    """Samples stacked to a batch."""
    samples = [dataset[i] for i in index]
    mask = None
    if not dataset.packed:
        num_tokens_B1 = torch.tensor([[sample.num_tokens] for sample in samples])
        mask = torch.arange(dataset.seq_len) >= num_tokens_B1
    return Batch(
        torch.from_numpy(np.stack([sample.tokens_S for sample in samples])),
        torch.from_numpy(np.stack([sample.targets_S for sample in samples])),
        mask,
        torch.tensor(index, dtype=torch.int64),
    )
