import numpy as np
import pytest
import torch

from expertmesh.data import order
from expertmesh.data.loader import Loader
from expertmesh.data.mixture import Mixture
from expertmesh.data.order import KeyedPermutation, permutation, shuffled
from expertmesh.random import fold


def keyed(length, key):
    lazy = KeyedPermutation(length, key)
    return np.array([lazy[place] for place in range(len(lazy))])


BOTH = pytest.mark.parametrize("make", [permutation, keyed], ids=["array", "keyed"])


@BOTH
def test_a_permutation_holds_each_number_once(make):
    for length in (1, 2, 3, 4, 5, 17, 64, 65, 1000):
        assert sorted(make(length, 3)) == list(range(length))


@BOTH
def test_it_depends_on_the_key_only(make):
    assert np.array_equal(make(50, 3), make(50, 3))
    assert not np.array_equal(make(50, 3), make(50, 4))


@pytest.mark.parametrize(
    ("make", "golden"),
    [(permutation, [2, 7, 0, 1, 5, 3, 6, 4]), (keyed, [7, 5, 6, 1, 2, 4, 3, 0])],
    ids=["array", "keyed"],
)
def test_it_is_the_same_forever(make, golden):
    """A changed order would silently change every run."""
    assert make(8, 1).tolist() == golden


@BOTH
def test_places_are_uniform(make):
    """Each number stands at each place about equally often: chi-square with 49 * 49 degrees."""
    length, keys = 8, 4000
    counts = np.zeros((length, length))
    for key in range(keys):
        counts[np.arange(length), make(length, key)] += 1
    expected = keys / length
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (length - 1) ** 2
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_neighbours_are_thrown_apart():
    length = 10**12
    lazy = KeyedPermutation(length, 5)
    places = [lazy[place] for place in range(2000)]
    assert len(set(places)) == 2000
    means = np.array(places, float).reshape(4, 500).mean(1) / length
    assert abs(means - 0.5).max() < 4 * (1 / 12 / 500) ** 0.5
    steps = np.diff(np.array(places, float)) / length
    assert abs(np.mean(np.sign(steps))) < 0.1


def test_a_place_beyond_the_end():
    with pytest.raises(IndexError):
        KeyedPermutation(10, 0)[10]


def test_a_large_order_is_not_an_array(monkeypatch):
    monkeypatch.setattr(order, "ARRAY_LIMIT", 1000)
    assert isinstance(shuffled(order.ARRAY_LIMIT, 0), np.ndarray)
    assert isinstance(shuffled(order.ARRAY_LIMIT + 1, 0), KeyedPermutation)


def plain_epoch(parts, counts, seed, epoch):
    """An epoch of a mixture by its definition: walk each part, lay end to end, shuffle."""
    chosen, start = [], 0
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        key = fold(seed, "part", number)
        passes = range((epoch + 1) * count // len(part) + 1)
        walked = np.concatenate([list(part.order(key, one)) for one in passes])
        chosen.append(start + walked[epoch * count : (epoch + 1) * count])
        start += len(part)
    together = np.concatenate(chosen)
    places = shuffled(len(together), fold(seed, "mixture", epoch))
    return [int(together[place]) for place in places]


@pytest.mark.parametrize("limit", [order.ARRAY_LIMIT, 20, 1], ids=["arrays", "some", "none"])
@pytest.mark.parametrize("weights", [(3, 1, 1), (1, 9, 1)])
def test_a_mixture_walks_its_parts(numbers, monkeypatch, limit, weights):
    monkeypatch.setattr(order, "ARRAY_LIMIT", limit)
    parts = [numbers(30), numbers(7, first=1000), numbers(25, first=2000)]
    mixed = Mixture(dict(zip("abc", parts, strict=True)), dict(zip("abc", weights, strict=True)))
    for epoch in (0, 1, 4):
        expected = plain_epoch(parts, mixed.counts, 6, epoch)
        assert list(mixed.order(6, epoch)) == expected
    loader = Loader(mixed, batch_size=9, seed=6)
    again = Loader(mixed, batch_size=9, seed=6)
    seen = torch.cat([loader.batch(step).sample_index_B for step in range(30)])
    assert seen[: len(mixed)].tolist() == plain_epoch(parts, mixed.counts, 6, 0)
    assert again.batch(17).sample_index_B.tolist() == seen[17 * 9 : 18 * 9].tolist()
