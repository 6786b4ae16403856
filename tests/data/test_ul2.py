from collections import Counter

import numpy as np
import pytest
import torch

from expertmesh.data.dataset import IGNORE
from expertmesh.data.denoising import UL2, UL2_OPENMOE, Denoiser
from expertmesh.data.loader import Loader, in_order
from expertmesh.data.mixture import Mixture
from expertmesh.data.sentinels import ByteSentinelTokenizer
from expertmesh.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from expertmesh.data.tokens import TokenStream
from expertmesh.data.ul2 import DenoisingDataset
from expertmesh.errors import UserError
from expertmesh.random import fold

BYTES = ByteSentinelTokenizer()


class WithBos(Tokenizer):
    """Bytes and sentinels behind a first token."""

    vocab_size, eos_id, pad_id, bos_id = 384, 256, 257, 257
    sentinel_ids = range(383, 257, -1)
    identity = "with bos"

    def encode(self, text):
        return BYTES.encode(text)

    def decode(self, ids):
        return BYTES.decode(ids)

    def token_text(self, token_id):
        return BYTES.token_text(token_id)


def stream(length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 256, length).astype(np.uint16)
    return TokenStream(tokens, np.array([0, length]))


def parts(sample, tokenizer):
    """A row's mode, the text that is left and what was cut out, checked on the way."""
    learned = np.flatnonzero(sample.targets_S != IGNORE)
    row = [*sample.tokens_S[: sample.num_tokens].tolist(), int(sample.targets_S[learned[-1]])]
    first = int(learned[0]) + 1
    # Targets are one run up to the row's end, each the next token.
    assert learned.tolist() == list(range(first - 1, sample.num_tokens))
    assert sample.targets_S[learned].tolist() == row[first:]
    assert (sample.tokens_S[sample.num_tokens :] == tokenizer.pad_id).all()
    assert row[first - 1] == row[-1] == tokenizer.eos_id
    given = row[: first - 1]
    if tokenizer.bos_id is not None:
        assert given.pop(0) == tokenizer.bos_id
    mode = tokenizer.decode(given[:6])
    return mode, given[6:], row[first:-1]


def restored(left, out, sentinel_ids):
    """The text, from its two halves."""
    names = [token for token in left if token in sentinel_ids]
    if not names:
        return left + out
    assert names == [token for token in out if token in sentinel_ids]
    places = [out.index(name) for name in names] + [len(out)]
    pieces = {n: out[a + 1 : b] for n, a, b in zip(names, places, places[1:], strict=False)}
    assert all(pieces.values())
    return [t for token in left for t in pieces.get(token, [token])]


@pytest.mark.parametrize("tokenizer", [BYTES, WithBos()], ids=["no bos", "bos"])
@pytest.mark.parametrize("denoisers", [UL2, UL2_OPENMOE], ids=["ul2", "openmoe"])
@pytest.mark.parametrize("seq_len", [48, 129])
def test_every_token_is_in_one_row_and_can_be_put_back(tokenizer, denoisers, seq_len):
    data = stream(2000)
    dataset = DenoisingDataset(data, seq_len, tokenizer, denoisers)
    text, modes = [], set()
    for index in range(len(dataset)):
        mode, left, out = parts(dataset[index], tokenizer)
        text += restored(left, out, tokenizer.sentinel_ids)
        modes.add(mode)
    assert text == data.tokens[: len(text)].tolist()
    assert len(data.tokens) - len(text) < dataset.window
    assert modes == {"[NLU] ", "[NLG] ", "[S2S] "}


@pytest.mark.parametrize("denoisers", [UL2, UL2_OPENMOE], ids=["ul2", "openmoe"])
def test_the_longest_row_is_full(denoisers):
    dataset = DenoisingDataset(stream(40_000), 128, BYTES, denoisers)
    lengths = {dataset.drawn(0, key).num_tokens for key in range(300)}
    assert max(lengths) == 128


def test_denoisers_come_by_their_shares():
    dataset = DenoisingDataset(stream(1000), 128, BYTES, UL2_OPENMOE)
    counts = Counter(dataset.denoiser(key) for key in range(3000))
    for one in UL2_OPENMOE:
        # Three standard deviations of 3,000 draws.
        share = one.share / 100
        assert abs(counts[one] / 3000 - share) < 3 * (share * (1 - share) / 3000) ** 0.5


def test_random_choices_follow_the_place_in_the_run():
    dataset = DenoisingDataset(stream(3000), 64, BYTES, UL2)
    whole = [Loader(dataset, batch_size=5, seed=1).batch(step) for step in range(60)]
    again = Loader(dataset, batch_size=5, seed=1)
    for step in (0, 31, 59):
        assert torch.equal(whole[step].tokens_BS, again.batch(step).tokens_BS)
        assert torch.equal(whole[step].targets_BS, again.batch(step).targets_BS)
    rows = {}
    for batch in whole:
        for index, row in zip(batch.sample_index_B.tolist(), batch.tokens_BS, strict=True):
            rows.setdefault(index, set()).add(tuple(row.tolist()))
    times = 60 * 5 / len(dataset)
    assert times > 3
    assert np.mean([len(different) for different in rows.values()]) > 0.8 * times
    other = Loader(dataset, batch_size=5, seed=2).batch(0)
    assert not torch.equal(whole[0].tokens_BS, other.tokens_BS)


def test_the_place_is_known_within_a_mixture(numbers):
    dataset = DenoisingDataset(stream(3000), 64, BYTES, UL2)
    mixed = Mixture({"a": numbers(10, seq_len=64), "b": dataset}, {"a": 1, "b": 1})
    key = fold(5, "x")
    sample = mixed.drawn(10 + 3, key)
    assert np.array_equal(sample.tokens_S, dataset.drawn(3, key).tokens_S)
    assert not np.array_equal(sample.tokens_S, mixed.drawn(13, key + 1).tokens_S)


def test_evaluation_reads_the_same_rows_each_time():
    dataset = DenoisingDataset(stream(3000), 64, BYTES, UL2)
    first, second = (list(in_order(dataset, 8)) for _ in range(2))
    assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(batch.padding_mask_BS.sum(1), 64 - _lengths(batch)) for batch in first)


def _lengths(batch):
    last = (batch.targets_BS != IGNORE).int() * torch.arange(1, 65)
    return last.max(1).values


def test_a_tokenizer_without_sentinels_is_refused():
    with pytest.raises(UserError, match=r"but the tokenizer has 0 sentinels.*byte-ul2"):
        DenoisingDataset(stream(1000), 64, ByteTokenizer(), UL2)


def test_prefix_tasks_need_no_sentinel():
    only = [Denoiser(mode="[S2S]", share=1, rate=0.5, mean_span=None)]
    dataset = DenoisingDataset(stream(1000), 64, ByteTokenizer(), only)
    mode, left, out = parts(dataset[0], ByteTokenizer())
    assert mode == "[S2S] "
    assert left + out == dataset.stream.tokens[: dataset.window].tolist()


def test_too_many_spans_for_the_sentinels():
    with pytest.raises(UserError, match="can have 127 spans, but the tokenizer has 126 sentinels"):
        DenoisingDataset(stream(10), 1025, BYTES, UL2)


def test_rows_that_are_too_short():
    with pytest.raises(UserError, match=r"data.seq_len=15 is too low.*takes 6 tokens"):
        DenoisingDataset(stream(1000), 15, BYTES, UL2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("denoisers", "fill"), [(UL2, 0.82), (UL2_OPENMOE, 0.80)], ids=["ul2", "openmoe"]
)
def test_rows_of_2048_with_umt5(denoisers, fill):
    dataset = DenoisingDataset(stream(8000), 2048, load_tokenizer("tokenizer-umt5"), denoisers)
    assert dataset.window == 1531
    whole = sum(one.share for one in denoisers)
    lengths = [dataset.drawn(0, key).num_tokens for key in range(400)]
    by_denoiser = {dataset.denoiser(key): length for key, length in enumerate(lengths)}
    mean = sum(one.share / whole * by_denoiser[one] for one in denoisers)
    assert round(mean / 2048, 2) == fill
