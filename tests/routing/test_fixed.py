import pytest
import torch

from expertmesh.routing import FixedRouter, RoundRobinRouter, UniformRouter

X = torch.randn(7, 3)


def test_round_robin_takes_turns():
    routing = RoundRobinRouter(3, 5, 2)(X)
    assert routing.expert_TK.tolist() == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4], [0, 1], [2, 3]]
    assert (routing.weight_TK == 0.5).all()
    assert routing.load_E.tolist() == [3, 3, 3, 3, 2]


def test_fixed_takes_always_the_same():
    routing = FixedRouter(3, 5, (4, 1))(X)
    assert routing.expert_TK.tolist() == [[4, 1]] * 7
    assert routing.load_E.tolist() == [0, 7, 0, 0, 7]


def test_uniform_takes_each_set_as_often():
    router = UniformRouter(3, 4, 2)
    torch.manual_seed(0)
    chosen = router(torch.zeros(12_000, 3)).expert_TK.sort(dim=1).values
    assert (chosen[:, 0] < chosen[:, 1]).all()
    counts = torch.bincount(chosen[:, 0] * 4 + chosen[:, 1])
    counts = counts[counts > 0]
    assert len(counts) == 6
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()
    assert not torch.equal(router(X).expert_TK, router(X).expert_TK)
    router.eval()
    assert torch.equal(router(X).expert_TK, router(X).expert_TK)


def test_bad_input():
    with pytest.raises(ValueError, match="k must be between 1 and num_experts=4, got 5"):
        UniformRouter(3, 4, 5)
    with pytest.raises(ValueError, match="k must be between 1 and num_experts=4, got 0"):
        RoundRobinRouter(3, 4, 0)
    for experts in ((), (0, 0), (4,), (-1,)):
        with pytest.raises(ValueError, match="different numbers from 0 to 3"):
            FixedRouter(3, 4, experts)


@pytest.mark.parametrize("router", [UniformRouter(3, 4, 3), RoundRobinRouter(3, 4, 3)])
def test_weights_are_as_wide_as_the_tokens(router):
    assert (router(X).weight_TK == torch.tensor(1 / 3)).all()
    weight_TK = router(X.double(), padding_mask=torch.arange(7) == 2).weight_TK
    assert weight_TK.dtype == torch.float64
    assert (weight_TK[2] == 0).all()
    assert (weight_TK[torch.arange(7) != 2] == 1 / 3).all()
