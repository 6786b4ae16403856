"""The reference token sets: float64 numbers computed by hand formulas, quoted to six digits."""

import pytest
import torch

from expertmesh.routing import TopKRouter

ONE = [[2.0, 1.0, 0.0, -1.0]]
FOUR = [[2.0, 1.0, 0.0, -1.0], [1.0, 2.0, 0.0, -1.0], [3.0, 0.0, 1.0, -1.0], [2.5, 1.0, -1.0, 0.0]]


@pytest.fixture
def one_token():
    return torch.tensor(ONE, dtype=torch.float64)


@pytest.fixture
def four_tokens():
    return torch.tensor(FOUR, dtype=torch.float64)


@pytest.fixture
def identity_router():
    """A router whose logits are its input."""

    def make(k, num_experts=4, **options):
        router = TopKRouter(num_experts, num_experts, k, dtype=torch.float64, **options)
        with torch.no_grad():
            router.weight_ED.copy_(torch.eye(num_experts))
        return router

    return make
