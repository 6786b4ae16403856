"""Token streams cut into samples: packed, or one document (or a piece of it) per row."""

from typing import final

import numpy as np

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
        tokens = np.full(self.seq_len, self.pad_id, np.int64)
        targets = np.full(self.seq_len, IGNORE, np.int64)
        tokens[: len(row) - 1] = row[:-1]
        targets[: len(row) - 1] = row[1:]
        return Sample(tokens, targets, len(row) - 1)
