import itertools

import pytest
import torch

from expertmesh.routing.auction import balanced_assignment


def best_sum(value_NE):
    """The best balanced assignment's sum, by trying all."""
    num_tokens, num_experts = value_NE.shape
    seats = -(-num_tokens // num_experts)
    sums = [
        sum(value_NE[t, e].item() for t, e in enumerate(choice))
        for choice in itertools.product(range(num_experts), repeat=num_tokens)
        if max(choice.count(e) for e in range(num_experts)) <= seats
    ]
    return max(sums)


def reached(value_NE, expert_N):
    return value_NE[torch.arange(len(value_NE)), expert_N].sum().item()


@pytest.mark.parametrize("seed", range(30))
def test_is_balanced_and_as_good_as_promised(seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_experts = seed % 6 + 1, seed % 4 + 1
    value_NE = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    value_NE = value_NE.round() if seed % 3 == 0 else value_NE  # with ties
    expert_N = balanced_assignment(value_NE, tolerance=1e-3)
    seats = -(-num_tokens // num_experts)
    assert torch.bincount(expert_N, minlength=num_experts).max() <= seats
    slack = num_experts * seats * 1e-3 * (value_NE.max() - value_NE.min()).item()
    assert reached(value_NE, expert_N) >= best_sum(value_NE) - slack - 1e-12


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_problems_are_within_tolerance_of_the_dual_bound(scale):
    """Any prices bound the best sum from above; those near the assignment's own bound it well."""
    generator = torch.Generator().manual_seed(0)
    value_NE = scale * torch.randn(600, 8, generator=generator, dtype=torch.float64)
    value_NE[:, 0] += scale  # one expert is everyone's favourite
    expert_N = balanced_assignment(value_NE, tolerance=1e-3)
    assert torch.bincount(expert_N).tolist() == [75] * 8
    price_E = value_NE.new_zeros(8)
    for _ in range(400):
        demand_E = ((value_NE - price_E) / (0.01 * scale)).softmax(1).sum(0)
        price_E += 0.01 * scale * (demand_E / 75).log()
    bound = (value_NE - price_E).amax(1).sum() + 75 * price_E.sum()
    span = value_NE.max() - value_NE.min()
    assert 0 <= bound - reached(value_NE, expert_N) <= 600 * 1e-3 * span


def test_equal_values_fill_experts_in_order():
    assert balanced_assignment(torch.zeros(5, 2)).tolist() == [0, 0, 0, 1, 1]
    same = torch.tensor([[3.0, 1.0, 2.0]]).expand(9, 3)
    assert torch.bincount(balanced_assignment(same)).tolist() == [3, 3, 3]


def test_masked_tokens_take_no_seat():
    value_NE = torch.tensor([[9.0, 0.0], [torch.nan, torch.nan], [8.0, 0.0], [5.0, 0.0]])
    mask = torch.tensor([False, True, False, False])
    assert balanced_assignment(value_NE, mask).tolist() == [0, 2, 0, 1]
    assert balanced_assignment(value_NE, ~mask & False | True).tolist() == [2, 2, 2, 2]
    assert balanced_assignment(torch.zeros(0, 3)).tolist() == []
    assert balanced_assignment(torch.randn(3, 1)).tolist() == [0, 0, 0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_take_the_seats_that_are_left(bad):
    value_NE = torch.tensor([[9.0, 0.0], [8.0, bad], [7.0, 0.0], [0.0, 1.0]])
    assert balanced_assignment(value_NE).tolist() == [0, 1, 0, 1]
    assert torch.bincount(balanced_assignment(value_NE * torch.nan)).tolist() == [2, 2]
