import pytest
import torch

from expertmesh.routing import balanced_table, clustered_table, dispersed_table, random_table


def test_random_table_is_a_function_of_the_seed_and_reaches_all():
    table = random_table(500, 7, seed=3)
    assert torch.equal(table, random_table(500, 7, seed=3))
    assert not torch.equal(table, random_table(500, 7, seed=4))
    assert torch.bincount(table, minlength=7).min() > 40
    assert table.max() < 7


def test_balanced_table_is_the_greedy_rule():
    table = balanced_table(torch.tensor([5, 9, 5, 1, 3, 0, 0, 0]), 3)
    assert table.tolist() == [1, 0, 2, 2, 1, 2, 2, 2]
    counts = torch.randint(1000, (300,), generator=torch.Generator().manual_seed(0))
    load = torch.zeros(8, dtype=torch.int64).index_add(0, balanced_table(counts, 8), counts)
    assert load.max() - load.min() <= 10
    # As frequent as each other, ids go to the expert with the fewest.
    assert torch.bincount(balanced_table(torch.zeros(12, dtype=torch.int64), 4)).tolist() == [3] * 4


def blobs():
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(4, 3, generator=generator)
    kind = torch.arange(40) % 4
    return centres[kind] + torch.randn(40, 3, generator=generator), kind


def test_clusters_are_those_of_the_points():
    points, kind = blobs()
    table = clustered_table(points, 4, seed=1)
    pairs = {(int(a), int(b)) for a, b in zip(table, kind, strict=True)}
    assert len(pairs) == 4
    assert len({a for a, _ in pairs}) == 4
    assert torch.equal(table, clustered_table(points, 4, seed=1))


def test_equal_points_make_no_trouble():
    table = clustered_table(torch.ones(6, 2), 3)
    assert table.tolist() == [0] * 6


def test_dispersed_table_spreads_every_cluster():
    _, kind = blobs()
    table = dispersed_table(kind, 5)
    for cluster in range(4):
        assert torch.bincount(table[kind == cluster], minlength=5).tolist() == [2] * 5


def test_bad_input():
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        random_table(5, 0)
    with pytest.raises(ValueError, match="the number of ids must be at least 1"):
        dispersed_table(torch.zeros(0, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="count_V must be integers"):
        balanced_table(torch.ones(4), 2)
    with pytest.raises(ValueError, match="at least num_experts=3 rows"):
        clustered_table(torch.ones(2, 2), 3)
