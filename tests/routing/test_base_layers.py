import pytest
import torch

from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.routing import BaseRouter
from expertmesh.routing.auction import balanced_assignment


def test_training_balances_and_evaluation_takes_the_best():
    x = torch.randn(22, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    router = BaseRouter(6, 4, seed=0, dtype=torch.float64)
    logits = x @ router.weight_ED.T
    routing = router(x)
    assert routing.load_E.max() == 6
    assert routing.load_E.sum() == 22
    assert routing.most_per_expert == 6
    chosen = routing.expert_TK
    torch.testing.assert_close(routing.weight_TK, logits.gather(1, chosen).sigmoid())
    best = balanced_assignment(logits.detach(), tolerance=1e-4)
    reach = logits.gather(1, chosen).sum() - logits.gather(1, best[:, None]).sum()
    # Twelve bits of affinities and the auction's tolerance.
    assert abs(reach) <= 24 * 2e-3 * (logits.max() - logits.min())
    later = router.eval()(x)
    assert torch.equal(later.expert_TK[:, 0], logits.argmax(1))
    assert later.load_E.max() > 6


def test_the_residual_branch_makes_the_papers_mixture():
    """alpha f(h) + (1 - alpha) h with f(h) = h + delta(h) is the block's h + alpha delta(h)."""
    h = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moe = MoE(BaseRouter(6, 2, seed=0, gain=1.0), MLPExperts(6, 5, 2, seed=0)).double()
    y, routing = moe(h, return_routing=True)
    alpha = routing.weight_TK
    delta = moe.experts(h, routing.expert_TK, torch.ones_like(alpha))
    torch.testing.assert_close(h + y, alpha * (h + delta) + (1 - alpha) * h)


def test_centroids_learn_through_the_weight_alone():
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    router = BaseRouter(6, 2, seed=0, dtype=torch.float64)
    routing = router(x)
    routing.weight_TK.sum().backward()
    alpha = routing.weight_TK.detach()
    slope = (alpha * (1 - alpha)) * x
    expected = torch.zeros(2, 6, dtype=torch.float64).index_add(0, routing.expert_TK[:, 0], slope)
    torch.testing.assert_close(router.weight_ED.grad, expected)


@pytest.mark.parametrize(("dim", "num_experts"), [(6, 4), (3, 5)])
def test_centroids_start_orthogonal(dim, num_experts):
    weight = BaseRouter(dim, num_experts, seed=3, dtype=torch.float64).weight_ED.detach()
    gram = weight @ weight.T if num_experts <= dim else weight.T @ weight
    torch.testing.assert_close(gram, 0.01 * torch.eye(len(gram), dtype=torch.float64))


def test_replay_has_the_bound_of_the_record_in_either_mode():
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    router = BaseRouter(6, 4, seed=0)
    tight, loose = router.train()(x), router.eval()(x)
    assert (tight.most_per_expert, loose.most_per_expert) == (3, None)
    for training in (True, False):
        router.train(training)
        assert router(x, routing=tight).most_per_expert == 3
        assert router(x, routing=loose).most_per_expert is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_neither_hangs_nor_spreads(bad):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    x[3, 2] = bad
    router = BaseRouter(16, 8, seed=0)
    routing = router(x)
    assert routing.load_E.tolist() == [8] * 8
    others = torch.arange(64) != 3
    assert routing.weight_TK[others].isfinite().all()
    scores = (x @ router.weight_ED.T).sigmoid().gather(1, routing.expert_TK)
    torch.testing.assert_close(routing.weight_TK, scores, equal_nan=True)
    assert router(x * torch.nan).weight_TK.isnan().all()


def test_bad_input():
    with pytest.raises(ValueError, match="tolerance must be in"):
        BaseRouter(4, 4, tolerance=0)
    with pytest.raises(ValueError, match="gain must be a finite number of at least 0, got nan"):
        BaseRouter(4, 4, gain=torch.nan)
    with pytest.raises(ValueError, match="num_experts must be at least 1"):
        BaseRouter(4, 0)
