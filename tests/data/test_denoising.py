from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.data.denoising import (
    UL2,
    UL2_OPENMOE,
    Denoiser,
    cut_out,
    noise,
    noise_spans,
    noise_suffix,
)

SENTINELS = range(10_000, 9_000, -1)


def runs(mask):
    return [(bool(value), len(list(group))) for value, group in groupby(mask)]


def span(rate, mean_span):
    return Denoiser(mode="", share=1, rate=rate, mean_span=mean_span)


def suffix(rate):
    return Denoiser(mode="", share=1, rate=rate, mean_span=None)


def restored(left, out):
    """What was cut out, back in its place."""
    pieces, name = {}, None
    for token in out:
        if token in SENTINELS:
            name = token
            pieces[name] = []
        else:
            pieces[name].append(token)
    return [t for token in left for t in (pieces.pop(token) if token in SENTINELS else [token])]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 300),
    rate=st.sampled_from([0.01, 0.15, 0.25, 0.5, 0.9]),
    mean_span=st.sampled_from([1, 3, 8, 64]),
    key=st.integers(0, 1 << 40),
)
def test_spans_and_the_way_back(length, rate, mean_span, key):
    denoiser = span(rate, mean_span)
    mask = noise_spans(length, denoiser, key)
    assert len(mask) == length
    assert int(mask.sum()) == denoiser.num_noise(length)
    parts = runs(mask)
    assert [noisy for noisy, _ in parts] == [False, True] * denoiser.num_spans(length)
    tokens = np.arange(length) + 5
    left, out = cut_out(tokens, mask, SENTINELS)
    assert restored(left.tolist(), out.tolist()) == tokens.tolist()
    used = [token for token in left.tolist() if token in SENTINELS]
    assert used == list(SENTINELS[: denoiser.num_spans(length)])
    assert len(left) + len(out) == length + 2 * denoiser.num_spans(length)


def test_an_example_by_hand():
    mask = np.array([0, 1, 0, 1, 1], bool)
    left, out = cut_out(np.array([1, 2, 3, 4, 5]), mask, [99, 98, 97])
    assert left.tolist() == [1, 99, 3, 98]
    assert out.tolist() == [99, 2, 98, 4, 5]


@pytest.mark.parametrize("denoiser", [*UL2, *UL2_OPENMOE])
def test_published_rates_and_mean_lengths(denoiser):
    length, keys = 4096, range(40)
    masks = [noise(length, denoiser, key) for key in keys]
    rate = np.mean([mask.mean() for mask in masks])
    if denoiser.mean_span is None:
        # The standard error of 40 even draws is 0.29 / sqrt(40) = 0.05 of the range.
        assert abs(rate - denoiser.rate) < 0.15 * 2 * denoiser.rate
        return
    assert abs(rate - denoiser.rate) < 1 / length
    spans = [size for mask in masks for noisy, size in runs(mask) if noisy]
    # Whole spans: 10 of them where 9.6 would be exact.
    assert abs(np.mean(spans) / denoiser.mean_span - 1) < 0.05


def test_all_ways_to_cut_are_equally_likely():
    # 6 tokens, 3 of them in 2 spans: (1, 2) or (2, 1) for the spans, and for the gaps.
    masks = [tuple(noise_spans(6, span(0.5, 1.5), key)) for key in range(2000)]
    counts = [masks.count(mask) for mask in set(masks)]
    assert len(counts) == 4
    assert max(abs(count - 500) for count in counts) < 100


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_a_prefix_has_every_length_of_its_range(rate):
    length = 9
    kept = {int((~noise_suffix(length, suffix(rate), key)).sum()) for key in range(400)}
    shortest = max(1, round((1 - 2 * rate) * (length - 1)))
    assert kept == set(range(shortest, length))
    mask = noise_suffix(length, suffix(rate), 3)
    assert [noisy for noisy, _ in runs(mask)] == [False, True]


@pytest.mark.parametrize("denoiser", [span(0.15, 3), suffix(0.25), suffix(0.5)])
def test_two_tokens(denoiser):
    assert noise(2, denoiser, 0).tolist() == [False, True]


def test_masks_follow_the_key():
    denoiser = span(0.5, 3)
    assert np.array_equal(noise(64, denoiser, 7), noise(64, denoiser, 7))
    assert not np.array_equal(noise(64, denoiser, 7), noise(64, denoiser, 8))


def test_published_shares():
    assert len(UL2) == 7
    assert {one.share for one in UL2} == {1}
    assert sum(one.share for one in UL2_OPENMOE) == 100
    assert [one.share for one in UL2_OPENMOE if one.mean_span is None] == [50]
    low = [one.share for one in UL2_OPENMOE if one.rate == 0.15]
    assert sum(low) == 20
