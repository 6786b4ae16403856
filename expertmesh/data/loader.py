"""Batches as a function of the step."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import numpy as np
import torch
from torch import Tensor

from expertmesh.data.dataset import IGNORE, Dataset, Sample
from expertmesh.data.decimals import as_written
from expertmesh.errors import UserError
from expertmesh.random import fold

# Of a sample's objects in Python, beside what is in its arrays.
_SAMPLE_BYTES = 300


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
    state to save. A sample's own random choices are a function of the seed and its place, so they
    differ from epoch to epoch.

    torchdata's StatefulDataLoader is not used: its state belongs to one rank and one number of
    workers, and loading it elsewhere fails. The place in the data is one global number here, so a
    run continues on any number of ranks; reading a memory-mapped row needs no worker either.

    Args:
        dataset: Must have at least one sample.
        batch_size: Rows of the global batch.
        seed: Of the order of samples.

    Raises:
        UserError: For no sample, or a batch that is larger than this machine's memory.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if len(dataset) == 0:
            raise UserError("the data set has no sample; give more text or set a lower seq_len")
        _check_memory(batch_size, dataset.seq_len)
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
        drawn = [self.sample(place) for place in places]
        return stack(self.dataset, [i for i, _ in drawn], [sample for _, sample in drawn])

    def sample(self, place: int) -> tuple[int, Sample]:
        """The number of the sample at a place of the run, counted from 0, and the sample."""
        epoch, within = divmod(place, len(self.dataset))
        index = int(self._order(epoch)[within])
        return index, self.dataset.drawn(index, fold(self.seed, "sample", place))

    def steps(self, epochs: float) -> int:
        """Steps after which each place of so many epochs was taken; the last may go beyond."""
        if not 0 < epochs < math.inf:
            raise UserError(f"epochs must be a positive number, got {epochs}")
        return math.ceil(as_written(epochs) * len(self.dataset) / self.batch_size)

    def epoch(self, step: int) -> float:
        """Epochs taken before a step: 1.5 is the middle of the second."""
        return step * self.batch_size / len(self.dataset)

    def batches(self, step: int = 0) -> Iterator[Batch]:
        """Batches from a step on, without end."""
        while True:
            yield self.batch(step)
            step += 1


def _check_memory(batch_size: int, seq_len: int) -> None:
    """Refuse a batch that would fill the memory before it is complete: nothing else would stop it.

    Tokens and targets are there twice for a moment, as samples and as a batch.
    """
    needed = batch_size * (4 * seq_len * np.dtype(np.int64).itemsize + _SAMPLE_BYTES)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"a batch of {batch_size:,} sequences of {seq_len:,} tokens needs "
            f"{needed / 2**30:,.0f} GiB, this machine has {there / 2**30:,.0f}; set a lower "
            "train.batch"
        )


def in_order(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """Every sample once, unshuffled: for evaluation. The last batch may be smaller."""
    for start in range(0, len(dataset), batch_size):
        yield collate(dataset, range(start, min(start + batch_size, len(dataset))))


def collate(dataset: Dataset, index: Sequence[int]) -> Batch:
    """Samples of a data set as a batch."""
    return stack(dataset, index, [dataset[i] for i in index])


def stack(dataset: Dataset, index: Sequence[int], samples: Sequence[Sample]) -> Batch:
    """Samples that were read already as a batch."""
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
