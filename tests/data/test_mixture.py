from collections import Counter

import numpy as np
import pytest
import torch

from expertmesh.data.loader import Loader, in_order
from expertmesh.data.mixture import Mixture
from expertmesh.errors import UserError


@pytest.fixture
def mixture(numbers):
    def make(weights, lengths):
        parts = {f"p{i}": numbers(n, first=1000 * i) for i, n in enumerate(lengths)}
        return Mixture(parts, dict(zip(parts, weights, strict=True)))

    return make


def values(mixture, seed, epoch):
    return [int(mixture[int(i)].tokens_S[0]) for i in mixture.order(seed, epoch)]


@pytest.mark.parametrize("weights", [(3, 1), (0.75, 0.25), (1, 1, 2), (10, 1)])
def test_shares_of_every_epoch_are_exact(mixture, weights):
    mixed = mixture(weights, [40, 24, 8][: len(weights)])
    for epoch in range(3):
        counts = Counter(value // 1000 for value in values(mixed, 0, epoch))
        for part, weight in enumerate(weights):
            assert abs(counts[part] - weight / sum(weights) * len(mixed)) < 1


def test_weights_by_size_give_each_sample_once(mixture):
    mixed = mixture([30, 10], [30, 10])
    expected = sorted([*range(30), *range(1000, 1010)])
    assert sorted(values(mixed, 5, 0)) == sorted(values(mixed, 5, 1)) == expected


def test_when_an_epoch_ends_no_sample_is_two_passes_ahead_of_another(mixture):
    mixed = mixture([1, 3], [30, 10])
    seen = Counter()
    for epoch in range(5):
        seen.update(values(mixed, 1, epoch))
        for part, length in ((0, 30), (1, 10)):
            counts = [seen[1000 * part + i] for i in range(length)]
            assert max(counts) - min(counts) <= 1


def test_order_is_a_function_of_seed_and_epoch(mixture):
    mixed = mixture([1, 3], [30, 10])
    later = mixed.order(3, 2)
    mixed.order(9, 0)
    assert np.array_equal(later, mixture([1, 3], [30, 10]).order(3, 2))
    assert not np.array_equal(later, mixed.order(4, 2))
    assert not np.array_equal(later, mixed.order(3, 1))


def test_equal_parts_are_not_walked_alike(mixture):
    mixed = mixture([1, 1], [50, 50])
    drawn = values(mixed, 0, 0)
    first = [value for value in drawn if value < 1000]
    second = [value - 1000 for value in drawn if value >= 1000]
    assert first != second


def test_the_loader_takes_it(mixture):
    mixed = mixture([1, 3], [30, 10])
    batch = Loader(mixed, batch_size=40, seed=2).batch(0)
    assert int((batch.tokens_BS[:, 0] >= 1000).sum()) == 30
    assert sum(len(b.tokens_BS) for b in in_order(mixed, 7)) == 40


def test_numbers_run_through_the_parts(mixture):
    mixed = mixture([1, 1, 1], [2, 1, 2])
    assert [int(mixed[i].tokens_S[0]) for i in range(5)] == [0, 1, 1000, 2000, 2001]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_must_be_positive(mixture, weight):
    with pytest.raises(UserError, match=r"mix\['p1'\] must be a positive number"):
        mixture([1, weight], [3, 3])


def test_other_refusals(mixture, numbers):
    with pytest.raises(UserError, match=r"mix\['p1'\] has no sample"):
        mixture([1, 1], [3, 0])
    with pytest.raises(UserError, match="the smallest weight gets none of the 6 samples"):
        mixture([1000, 1], [3, 3])
    with pytest.raises(UserError, match="must share one seq_len"):
        Mixture({"a": numbers(1), "b": numbers(1, seq_len=3)}, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="got weights for"):
        Mixture({"a": numbers(1)}, {"b": 1})


def test_many_sources_of_very_different_sizes_and_weights(mixture):
    """The nine parts of a pre-training mixture, resumed anywhere."""
    weights = [7.5, 2.25, 1.0, 1.25, 2.25, 2.25, 33.5, 0.5, 50.0]
    lengths = [500, 3, 1, 40, 2, 900, 10, 70, 25]
    mixed = mixture(weights, lengths)
    whole = Loader(mixed, batch_size=31, seed=3)
    drawn = [whole.batch(step) for step in range(250)]
    for step in (0, 117, 249):
        fresh = Loader(mixture(weights, lengths), batch_size=31, seed=3).batch(step)
        assert torch.equal(fresh.tokens_BS, drawn[step].tokens_BS)
        assert torch.equal(fresh.sample_index_B, drawn[step].sample_index_B)
    places = torch.cat([batch.tokens_BS[:, 0] for batch in drawn])[: 4 * len(mixed)]
    for part, (weight, length) in enumerate(zip(weights, lengths, strict=True)):
        own = places[places // 1000 == part] % 1000
        # Whole places of four epochs.
        assert abs(len(own) - 4 * weight / sum(weights) * len(mixed)) < 4
        counts = torch.bincount(own, minlength=length)
        assert int(counts.max() - counts.min()) <= 1
