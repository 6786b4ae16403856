"""Experts of different structure."""

import pytest
import torch
from torch import nn

from expertmesh.experts import HeterogeneousExperts
from expertmesh.testing import assert_close


def make() -> HeterogeneousExperts:
    wide = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
    return HeterogeneousExperts([nn.Linear(4, 4), wide, nn.Identity()], dim=4)


def test_is_the_weighted_sum() -> None:
    experts = make()
    x = torch.randn(2, 4)
    weight = torch.rand(2, 2)
    y = experts(x, torch.tensor([[0, 1], [2, 3]]), weight)
    first, second, _ = experts.modules_by_expert
    assert_close("row 0", y[0], weight[0, 0] * first(x[0]) + weight[0, 1] * second(x[0]))
    assert_close("row 1", y[1], weight[1, 0] * x[1])


def test_idle_experts_have_zero_gradients() -> None:
    experts = make()
    expert = torch.zeros(3, 1, dtype=torch.int64)
    experts(torch.randn(3, 4), expert, torch.ones(3, 1)).sum().backward()
    first, second, _ = experts.modules_by_expert
    assert first.weight.grad.count_nonzero() > 0
    assert all(p.grad.count_nonzero() == 0 for p in second.parameters())


def test_no_rows() -> None:
    experts = make()
    y = experts(torch.randn(0, 4), torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2))
    y.sum().backward()
    assert y.shape == (0, 4)
    assert all(p.grad is not None for p in experts.parameters())


def test_reset_follows_the_seed() -> None:
    one, other = make(), make()
    one.reset_parameters(3)
    other.reset_parameters(3)
    for name, value in one.named_parameters():
        assert torch.equal(value, other.get_parameter(name)), name


def test_one_object_twice_is_refused() -> None:
    module = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="modules must be different objects"):
        HeterogeneousExperts([module, module], dim=4)


def test_no_modules() -> None:
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        HeterogeneousExperts([], dim=4)
