import numpy as np

from expertmesh.data.dataset import permutation


def test_a_permutation_holds_each_number_once():
    for length in (1, 2, 17, 1000):
        assert sorted(permutation(length, 3)) == list(range(length))


def test_it_depends_on_the_key_only():
    assert np.array_equal(permutation(50, 3), permutation(50, 3))
    assert not np.array_equal(permutation(50, 3), permutation(50, 4))


def test_it_is_the_same_forever():
    """Golden: a changed order would silently change every run."""
    assert permutation(8, 1).tolist() == [2, 7, 0, 1, 5, 3, 6, 4]


def test_places_are_uniform():
    """Each number stands at each place about equally often: chi-square with 49 * 49 degrees."""
    length, keys = 8, 4000
    counts = np.zeros((length, length))
    for key in range(keys):
        counts[np.arange(length), permutation(length, key)] += 1
    expected = keys / length
    chi_square = ((counts - expected) ** 2 / expected).sum()
    degrees = (length - 1) ** 2
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_an_order_differs_by_seed_and_epoch(numbers):
    data = numbers(40)
    orders = [tuple(data.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert tuple(data.order(0, 1)) == orders[1]
