"""Cutting spans out of a text and naming the holes (Raffel et al., 2020; Tay et al., 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from expertmesh.data.order import permutation
from expertmesh.random import fold, uniform

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """One task of a mixture of denoisers.

    Attributes:
        mode: The text before the input that says which kind of task it is.
        share: Part of the samples that get it, relative to the other denoisers' shares.
        rate: Part of the tokens that is to be predicted; for a prefix task, on average.
        mean_span: Mean length of the spans that are cut out. None is a prefix task: the end of the
            text is to be predicted from its beginning.
    """

    mode: str
    share: float
    rate: float
    mean_span: float | None

    def num_noise(self, length: int) -> int:
        """Tokens cut out of ``length``: at least one, and at least one stays."""
        return min(max(round(length * self.rate), 1), length - 1)

    def num_spans(self, length: int) -> int:
        """Spans cut out of ``length`` tokens; none in a prefix task, which needs no sentinel."""
        if self.mean_span is None:
            return 0
        num_noise = self.num_noise(length)
        return min(max(round(num_noise / self.mean_span), 1), num_noise, length - num_noise)


UL2 = (
    Denoiser(mode="[NLU]", share=1, rate=0.15, mean_span=3),
    Denoiser(mode="[NLU]", share=1, rate=0.15, mean_span=8),
    Denoiser(mode="[S2S]", share=1, rate=0.25, mean_span=None),
    Denoiser(mode="[NLG]", share=1, rate=0.5, mean_span=3),
    Denoiser(mode="[NLG]", share=1, rate=0.5, mean_span=8),
    Denoiser(mode="[NLG]", share=1, rate=0.15, mean_span=64),
    Denoiser(mode="[NLG]", share=1, rate=0.5, mean_span=64),
)
"""R, S and X denoisers in equal shares (Tay et al., 2022, https://arxiv.org/abs/2205.05131, table
1). The released models know the modes R, S and X as [NLU], [S2S] and [NLG]."""
UL2_OPENMOE = (
    Denoiser(mode="[NLU]", share=10, rate=0.15, mean_span=3),
    Denoiser(mode="[NLU]", share=10, rate=0.15, mean_span=8),
    Denoiser(mode="[NLG]", share=10, rate=0.5, mean_span=3),
    Denoiser(mode="[NLG]", share=10, rate=0.5, mean_span=8),
    Denoiser(mode="[NLG]", share=10, rate=0.5, mean_span=64),
    Denoiser(mode="[S2S]", share=50, rate=0.5, mean_span=None),
)
"""What OpenMoE began with: Xue et al., 2024, https://arxiv.org/abs/2402.01739, table 2."""


def noise_spans(length: int, denoiser: Denoiser, key: int) -> Mask:
    """Which tokens are cut out, ``(length,)``.

    The numbers of tokens and of spans are fixed by the length; spans and gaps alternate, beginning
    with a gap and ending with a span, and all ways to choose their lengths are equally likely.

    Args:
        length: At least 2.
        denoiser: With a mean span.
        key: Of the random choices.
    """
    num_noise, num_spans = denoiser.num_noise(length), denoiser.num_spans(length)
    gaps = _pieces(length - num_noise, num_spans, fold(key, "gaps"))
    spans = _pieces(num_noise, num_spans, fold(key, "spans"))
    lengths = np.stack([gaps, spans], axis=1).ravel()
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, lengths)


def noise_suffix(length: int, denoiser: Denoiser, key: int) -> Mask:
    """The end of the text, ``(length,)``.

    The beginning that stays has a length drawn evenly from ``round((1 - 2 rate)(length - 1))``
    (at least 1) to ``length - 1``, so that ``rate`` is the mean of what is cut off.
    """
    longest = length - 1
    shortest = min(max(round((1 - 2 * denoiser.rate) * longest), 1), longest)
    kept = shortest + int(draw(key) * (longest - shortest + 1))
    return np.arange(length) >= kept


def noise(length: int, denoiser: Denoiser, key: int) -> Mask:
    """``noise_spans``, or ``noise_suffix`` for a prefix task."""
    chosen = noise_suffix if denoiser.mean_span is None else noise_spans
    return chosen(length, denoiser, key)


def cut_out(tokens: Tokens, mask: Mask, sentinel_ids: Sequence[int]) -> tuple[Tokens, Tokens]:
    """The text with a sentinel for each span that is masked, and each span behind its sentinel.

    So "a b c d e" without "b" and "d e" is "a X c Y" and "X b Y d e".

    Args:
        tokens: ``(length,)``.
        mask: ``(length,)``, True where tokens are cut out.
        sentinel_ids: At least as many as there are spans, in order.

    Returns:
        The text that is left, and what was cut out.
    """
    before = np.concatenate([[False], mask[:-1]])
    first = mask & ~before
    number = np.cumsum(first) - 1
    sentinels = np.asarray(sentinel_ids[: int(first.sum())], np.int64)
    left = tokens.copy()
    left[first] = sentinels
    places = np.flatnonzero(first[mask])
    return left[~mask | first], np.insert(tokens[mask], places, sentinels[number[first]])


def draw(key: int) -> float:
    """A number in [0, 1)."""
    return float(uniform(key, torch.zeros((), dtype=torch.int64), torch.float64))


def _pieces(total: int, count: int, key: int) -> NDArray[np.int64]:
    """``count`` positive numbers that add up to ``total``, all ways equally likely."""
    cuts = np.sort(permutation(total - 1, key)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
