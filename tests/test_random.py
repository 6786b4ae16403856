import torch

from expertmesh import random
from expertmesh.random import RandomKey


def test_a_draw_depends_on_key_and_index_only():
    index = torch.arange(1000)
    whole = random.normal(7, index)
    assert torch.equal(whole[137:150], random.normal(7, index[137:150]))
    assert torch.equal(whole, random.normal(torch.tensor(7), index))
    assert not torch.equal(whole, random.normal(8, index))


def test_fold_agrees_on_ints_and_tensors_and_tells_labels_apart():
    for parts in [("a",), (1,), ("a", 1), (1, "a"), (-1,), ("noise", 3, "x")]:
        for seed in (0, 5, -1, (1 << 62) - 1):
            assert random.fold(seed, *parts) == random.fold(torch.tensor(seed), *parts).item()
    keys = {random.fold(0, *parts) for parts in [(0,), (1,), (0, 1), (1, 0), ("0",), ("a",)]}
    assert len(keys) == 6


def test_uniform_fills_the_unit_interval_evenly():
    draws = random.uniform(3, torch.arange(200_000), torch.float64)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=20, min=0, max=1)
    assert (counts / 10_000 - 1).abs().max() < 0.05
    # Neighbouring indices and neighbouring keys are uncorrelated.
    other = random.uniform(4, torch.arange(200_000), torch.float64)
    pairs = torch.stack([draws[:-1], draws[1:], other[:-1]])
    off_diagonal = torch.corrcoef(pairs) - torch.eye(3, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.01


def test_float32_and_float64_draws_agree_to_rounding():
    index = torch.arange(1000)
    assert (random.uniform(1, index) - random.uniform(1, index, torch.float64)).abs().max() < 1e-6


def test_normal_has_the_moments_of_a_standard_normal():
    draws = random.normal(11, torch.arange(400_000), torch.float64)
    assert abs(draws.mean()) < 0.01
    assert abs(draws.std() - 1) < 0.01
    assert abs((draws**4).mean() - 3) < 0.06
    assert draws.isfinite().all()


def test_fill_is_the_same_in_chunks_and_bounded_where_asked():
    long = torch.empty(700_001)
    random.fill_normal_(long, 0.5, key=3)
    short = torch.empty(10)
    random.fill_normal_(short, 0.5, key=3)
    assert torch.equal(long[:10], short)
    assert abs(long.std() - 0.5) < 0.01
    bounded = random.fill_normal_(torch.empty(100_000), 1.0, key=3, truncate=2)
    assert bounded.abs().max() <= 2.0
    assert abs(bounded.std() - 0.880) < 0.01  # of a normal cut at two standard deviations


def test_experts_are_drawn_by_their_own_index():
    whole = random.fill_expert_normal_(torch.empty(4, 3, 5), 1.0, key=9)
    fewer = random.fill_expert_normal_(torch.empty(2, 3, 5), 1.0, key=9)
    assert torch.equal(whole[:2], fewer)
    assert not torch.equal(whole[0], whole[1])


def test_fresh_seed_follows_the_generator_of_torch():
    torch.manual_seed(0)
    first = random.fresh_seed()
    assert random.fresh_seed() != first
    torch.manual_seed(0)
    assert random.fresh_seed() == first


def test_random_key_changes_with_seed_and_step():
    index = torch.arange(3)
    seeds = {RandomKey.of(s, t, index).seed.item() for s in range(3) for t in range(3)}
    assert len(seeds) == 9


def test_bits_take_a_key_for_each_row():
    key_N, index_F = random.bits(5, torch.arange(6)), torch.arange(4)
    table = random.bits(key_N.unsqueeze(1), index_F)
    assert table.shape == (6, 4)
    for row, key in enumerate(key_N.tolist()):
        assert torch.equal(table[row], random.bits(key, index_F))
    assert len(table.unique()) == 24
    rows = random.uniform(key_N.unsqueeze(1), index_F)
    assert torch.equal(rows[2], random.uniform(int(key_N[2]), index_F))
