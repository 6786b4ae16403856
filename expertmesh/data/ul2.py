"""The mixture-of-denoisers objective for a decoder-only model."""

from collections.abc import Sequence
from typing import final

import numpy as np

from expertmesh.data.dataset import IGNORE, Dataset, Sample
from expertmesh.data.denoising import Denoiser, cut_out, draw, noise
from expertmesh.data.packing import padded
from expertmesh.data.tokenizer import Tokenizer
from expertmesh.data.tokens import TokenStream
from expertmesh.errors import UserError
from expertmesh.random import fold

_LEAST_TOKENS = 8


@final
class DenoisingDataset(Dataset):
    """Pieces of the stream, each as a text with holes and then what was in them.

    Sample ``i`` reads tokens ``i*W`` to ``i*W + W - 1`` of the stream, where W is the most of which
    every denoiser's row fits into ``seq_len``. A denoiser is drawn by its share, and the row is

        bos, mode, text that is left, eos, what was cut out, eos

    with ``mode`` the tokens of the denoiser's mode and a space. In span tasks a sentinel stands in
    each hole and before each piece that was cut out; in prefix tasks the two parts are the text's
    beginning and end. Attention is causal over all of it. Targets are what was cut out, its
    sentinels and the last eos; the rest has none. Rows are padded at their end: how much depends on
    the denoiser.

    Args:
        stream: The tokens.
        seq_len: S.
        tokenizer: Must have sentinels.
        denoisers: The mixture.

    Raises:
        UserError: If the tokenizer has no or too few sentinels, or ``seq_len`` is too low.
    """

    packed = False

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        tokenizer: Tokenizer,
        denoisers: Sequence[Denoiser],
    ) -> None:
        self.stream = stream
        self.seq_len = seq_len
        self.denoisers = tuple(denoisers)
        self.sentinel_ids = tokenizer.sentinel_ids
        self._bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._eos = [tokenizer.eos_id]
        self._pad_id = tokenizer.pad_id
        self._mode = {one.mode: tokenizer.encode(one.mode + " ") for one in self.denoisers}
        self._ends = np.cumsum([one.share for one in self.denoisers])
        self.window = self._largest_window()
        most = max(one.num_spans(self.window) for one in self.denoisers)
        if most > len(self.sentinel_ids):
            lower = "a lower data.seq_len, or " if self.sentinel_ids else ""
            raise UserError(
                f"data.objective: a row of data.seq_len={seq_len} can have {most} spans, but the "
                f"tokenizer has {len(self.sentinel_ids)} sentinels; set {lower}"
                'data.tokenizer = "tokenizer-umt5" or "byte-ul2"'
            )

    def __len__(self) -> int:
        return len(self.stream.tokens) // self.window

    def __getitem__(self, index: int) -> Sample:
        return self.drawn(index, fold(0, "held", index))

    def drawn(self, index: int, key: int) -> Sample:
        start = index * self.window
        tokens = self.stream.tokens[start : start + self.window].astype(np.int64)
        return self._row(tokens, self.denoiser(key), fold(key, "noise"))

    def denoiser(self, key: int) -> Denoiser:
        """The one that a sample with this key gets."""
        place = draw(fold(key, "denoiser")) * self._ends[-1]
        return self.denoisers[int(np.searchsorted(self._ends, place, side="right"))]

    def _row(self, tokens: np.ndarray, denoiser: Denoiser, key: int) -> Sample:
        mask = noise(len(tokens), denoiser, key)
        if denoiser.mean_span is None:
            left, out = tokens[~mask], tokens[mask]
        else:
            left, out = cut_out(tokens, mask, self.sentinel_ids)
        given = np.concatenate([self._bos, self._mode[denoiser.mode], left, self._eos])
        row = np.concatenate([given, out, self._eos]).astype(np.int64)
        targets = row[1:].copy()
        targets[: len(given) - 1] = IGNORE
        return padded(row[:-1], targets, self.seq_len, self._pad_id)

    def _largest_window(self) -> int:
        window = self.seq_len
        while window >= _LEAST_TOKENS:
            if all(self._inputs(one, window) <= self.seq_len for one in self.denoisers):
                return window
            window -= 1
        raise UserError(
            f"data.seq_len={self.seq_len} is too low for this data.objective: the longest mode "
            f"takes {max(map(len, self._mode.values()))} tokens; set data.seq_len = 64 or more"
        )

    def _inputs(self, denoiser: Denoiser, window: int) -> int:
        """Input positions of a row: all of it but the last eos."""
        fixed = len(self._bos) + len(self._mode[denoiser.mode]) + len(self._eos)
        return fixed + window + 2 * denoiser.num_spans(window)
