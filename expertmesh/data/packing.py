"""Token streams cut into samples: packed, or one document (or a piece of it) per row."""

from typing import final

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.dataset import IGNORE, Dataset, Sample
from expertmesh.data.tokens import TokenStream


@final
class PackedDataset(Dataset):
    """The stream in rows of equal length, with no padding.

    Sample ``i`` reads tokens ``i*S`` to ``i*S + S``, both included: the last one is a target only,
    and the first input of sample ``i + 1``. So every token but the stream's first is a target once.
    A row may span documents: the end-of-document token between them is the only boundary. What is
    left over at the stream's end (fewer than S tokens) is not used.
    """

    packed = True

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return max(0, len(self.stream.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        start = index * self.seq_len
        row = self.stream.tokens[start : start + self.seq_len + 1].astype(np.int64)
        return Sample(row[:-1], row[1:], self.seq_len)


@final
class PackedFromBosDataset(Dataset):
    """The stream in rows of equal length, each behind the token that a model reads first.

    Sample ``i`` reads that token and tokens ``i*S`` to ``i*S + S - 2``, and predicts tokens ``i*S``
    to ``i*S + S - 1``, as T5's decoders do: every token is a target once. What is left over at the
    stream's end is not used.
    """

    packed = True

    def __init__(self, stream: TokenStream, seq_len: int, bos_id: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.bos_id = bos_id

    def __len__(self) -> int:
        return len(self.stream.tokens) // self.seq_len

    def __getitem__(self, index: int) -> Sample:
        start = index * self.seq_len
        row = self.stream.tokens[start : start + self.seq_len].astype(np.int64)
        return Sample(np.concatenate([[self.bos_id], row[:-1]]), row, self.seq_len)


@final
class DocumentDataset(Dataset):
    """One document per row, padded at its end; a longer one is split over several rows.

    Row ``j`` of a document reads its tokens ``j*S`` to ``j*S + S``, so that no target is lost at a
    cut. Its end-of-document token is the last target. Padding has no target, and no target is
    padding.
    """

    packed = False

    def __init__(self, stream: TokenStream, seq_len: int, pad_id: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.pad_id = pad_id
        # A document has at least one token and its end, so at least one target and one row.
        targets = np.diff(stream.offsets) - 1
        self._first_row = np.concatenate([[0], np.cumsum(-(-targets // seq_len))])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Sample:
        document = int(np.searchsorted(self._first_row, index, side="right")) - 1
        piece = index - int(self._first_row[document])
        start = int(self.stream.offsets[document]) + piece * self.seq_len
        stop = min(start + self.seq_len + 1, int(self.stream.offsets[document + 1]))
        row = self.stream.tokens[start:stop].astype(np.int64)
        return padded(row[:-1], row[1:], self.seq_len, self.pad_id)


@final
class DocumentFromBosDataset(Dataset):
    """One document per row behind the token that a model reads first, padded at its end.

    Row ``j`` of a document predicts its tokens ``j*S`` to ``j*S + S - 1``, the end-of-document
    token included.
    """

    packed = False

    def __init__(self, stream: TokenStream, seq_len: int, *, bos_id: int, pad_id: int) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.bos_id = bos_id
        self.pad_id = pad_id
        self._first_row = np.concatenate([[0], np.cumsum(-(-np.diff(stream.offsets) // seq_len))])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Sample:
        document = int(np.searchsorted(self._first_row, index, side="right")) - 1
        piece = index - int(self._first_row[document])
        start = int(self.stream.offsets[document]) + piece * self.seq_len
        stop = min(start + self.seq_len, int(self.stream.offsets[document + 1]))
        row = self.stream.tokens[start:stop].astype(np.int64)
        inputs = np.concatenate([[self.bos_id], row[:-1]])
        return padded(inputs, row, self.seq_len, self.pad_id)


def padded(
    tokens: NDArray[np.int64], targets: NDArray[np.int64], seq_len: int, pad_id: int
) -> Sample:
    """A sample of tokens and their targets, filled up at its end; padding has no target."""
    tokens_S = np.full(seq_len, pad_id, np.int64)
    targets_S = np.full(seq_len, IGNORE, np.int64)
    tokens_S[: len(tokens)] = tokens
    targets_S[: len(targets)] = targets
    return Sample(tokens_S, targets_S, len(tokens))
