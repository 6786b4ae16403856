"""Instruction data: conversations as rows whose prompts do not train."""

from typing import final

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.conversation import Conversation
from expertmesh.data.dataset import IGNORE, Dataset, Sample
from expertmesh.data.packing import padded
from expertmesh.data.templates import Template
from expertmesh.data.tokenizer import Tokenizer
from expertmesh.data.tokens import TokenStream


@final
class InstructionDataset(Dataset):
    """One conversation per row, cut and padded at its end.

    A target is what a learned token is predicted from: those of the prompt have none unless
    ``train_on_prompt``, those of padding never. A conversation of which nothing to be learned is
    left after the cut has no sample.

    Args:
        stream: One conversation per document: bos if there is one, prompt, answer, eos.
        learned: ``(num_tokens,)``, whether each token of the stream is to be learned.
        seq_len: S; S + 1 tokens of a conversation are read.
        pad_id: Fills rows.
        train_on_prompt: Learn the prompt too.
    """

    packed = False

    def __init__(
        self,
        stream: TokenStream,
        learned: NDArray[np.bool_],
        seq_len: int,
        *,
        pad_id: int,
        train_on_prompt: bool = False,
    ) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.pad_id = pad_id
        everything = np.broadcast_to(np.True_, learned.shape)
        self.learned = everything if train_on_prompt else learned
        starts, lengths = stream.offsets[:-1], np.diff(stream.offsets)
        stops = starts + np.minimum(lengths, seq_len + 1)
        # The first token of a row is never predicted.
        targets = _sums(self.learned, starts + 1, stops)
        self._kept = np.flatnonzero(targets)
        self.num_targets = int(targets.sum())
        self.num_truncated = int((lengths[self._kept] > seq_len + 1).sum())
        self.num_without_answer = int((targets == 0).sum())

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:
        place = int(self._kept[index])
        start = int(self.stream.offsets[place])
        stop = min(start + self.seq_len + 1, int(self.stream.offsets[place + 1]))
        row = self.stream.tokens[start:stop].astype(np.int64)
        targets = np.where(self.learned[start + 1 : stop], row[1:], IGNORE)
        return padded(row[:-1], targets, self.seq_len, self.pad_id)


def tokens_of(
    conversation: Conversation, template: Template, tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """A conversation's row, and which of its tokens are to be learned.

    The text is encoded as a whole, so that it has the tokens that the model will meet. A part ends
    where the tokens of the text up to its end and those of the whole part ways: a token across a
    prompt's end belongs to the answer.

    Returns:
        ``(length,)`` ids, from bos if there is one to eos, and ``(length,)`` flags.
    """
    pieces = template.pieces(conversation)
    text = "".join(piece for piece, _ in pieces)
    whole = tokenizer.encode(text)
    learned = np.zeros(len(whole), np.bool_)
    start, end = 0, 0
    for place, (piece, learns) in enumerate(pieces):
        end += len(piece)
        is_last = place == len(pieces) - 1
        stop = len(whole) if is_last else _common(tokenizer.encode(text[:end]), whole)
        learned[start:stop] = learns
        start = max(start, stop)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = np.concatenate([bos, whole, [tokenizer.eos_id]]).astype(np.int32)
    flags = np.concatenate([np.zeros(len(bos), np.bool_), learned, [pieces[-1][1]]])
    return ids, flags


def _sums(
    flags: NDArray[np.bool_], starts: NDArray[np.int64], stops: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How many flags are set in each of some ranges, in order and apart from each other."""
    bounds = np.stack([starts, stops], axis=1).ravel()
    inside = bounds[bounds < len(flags)]
    if not len(inside):
        return np.zeros(len(starts), np.int64)
    sums = np.zeros(len(bounds), np.int64)
    sums[: len(inside)] = np.add.reduceat(flags, inside, dtype=np.int64)
    # An empty range is given its first flag by numpy.
    return np.where(starts < stops, sums[::2], 0)


def _common(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Length of the beginning that both share."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
