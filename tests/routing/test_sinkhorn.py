import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.routing import ZLoss
from expertmesh.routing.sinkhorn import SinkhornRouter, sinkhorn_offsets
from expertmesh.testing import run_on_ranks
from tests.distributed.layers import DIM, HIDDEN, assert_same, pass_through


def plain_plan(logits, rounds):
    """Scale rows to 1/N and columns to 1/E in turn, in linear numbers."""
    plan = logits.double().exp()
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return plan


def make(k, num_experts=4, **options):
    router = SinkhornRouter(num_experts, num_experts, k, dtype=torch.float64, **options)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 30), st.integers(0, 99))
def test_selection_is_that_of_the_plain_plan(num_tokens, num_experts, rounds, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator)
    plan = plain_plan(logits, rounds)
    k = 1 + seed % num_experts
    router = make(k, num_experts, rounds=rounds).train()
    routing = router(logits)
    # By value: the plan of few tokens is even, and only rounding orders its experts.
    chosen = plan.gather(1, routing.expert_TK)
    torch.testing.assert_close(chosen, plan.topk(k, dim=1).values, rtol=1e-9, atol=0)
    assert all(len(set(row)) == k for row in routing.expert_TK.tolist())
    offset_E = sinkhorn_offsets(logits, rounds)
    scaled = (logits + offset_E).softmax(1)
    torch.testing.assert_close(scaled, plan / plan.sum(1, keepdim=True))


def test_columns_are_even_after_the_rounds():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 8, dtype=torch.float64, generator=generator)
    logits = logits + torch.linspace(0, 4, 8)
    plan = (logits + sinkhorn_offsets(logits, 50)).softmax(1)
    eight_E = torch.full((8,), 8.0, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(0), eight_E, rtol=0.02, atol=0)
    router = make(1, 8, rounds=50)
    assert int(router.eval()(logits).load_E.max()) > 14
    assert int(router.train()(logits).load_E.max()) < 12


def test_weights_are_raw_scores(four_tokens):
    one = make(1).train()(four_tokens)
    torch.testing.assert_close(one.weight_TK, four_tokens.sigmoid().gather(1, one.expert_TK))
    two = make(2).train()(four_tokens)
    torch.testing.assert_close(two.weight_TK, four_tokens.softmax(1).gather(1, two.expert_TK))


def test_evaluation_is_plain_top_k(four_tokens):
    routing = make(2).eval()(four_tokens)
    assert torch.equal(routing.expert_TK, four_tokens.topk(2, dim=1).indices)


def test_padding_and_nothing_change_nothing(four_tokens):
    router = make(2).train()
    x = torch.cat([four_tokens, torch.full((2, 4), math.nan, dtype=torch.float64)])
    mask = torch.arange(6) >= 4
    padded = router(x, padding_mask=mask)
    assert torch.equal(padded.expert_TK[:4], router(four_tokens).expert_TK)
    assert (padded.expert_TK[4:] == 4).all()
    assert padded.weight_TK[4:].abs().sum() == 0
    assert (router(x, padding_mask=torch.ones(6, dtype=torch.bool)).expert_TK == 4).all()
    assert router(four_tokens[:0]).expert_TK.shape == (0, 2)
    assert router(four_tokens[:1]).expert_TK.tolist() == [[0, 1]]


def test_extreme_logits_and_ties():
    router = make(1).train()
    x = torch.tensor([[1e4, -1e4, 0, 0], [1e4, -1e4, 0, 0], [0, 0, 0, 0.0]], dtype=torch.float64)
    routing = router(x)
    assert routing.weight_TK.isfinite().all()
    assert routing.expert_TK.max() < 4
    same = router(torch.zeros(8, 4, dtype=torch.float64))
    assert (same.expert_TK == 0).all()  # equal rows cannot be told apart


def test_replay_and_losses(four_tokens):
    router = make(2, losses=(ZLoss(coef=1.0),)).train()
    routing = router(four_tokens)
    assert float(routing.losses["z"].detach()) == pytest.approx(7.458575, abs=1e-6)
    again = router(four_tokens, routing=routing)
    assert torch.equal(again.weight_TK, routing.weight_TK)
    assert again.weight_TK.requires_grad


def layer():
    router = SinkhornRouter(DIM, 4, 2, init_std=1.0, seed=1, losses=(ZLoss(coef=0.01),))
    return MoE(router, GatedMLPExperts(DIM, HIDDEN, 4, init_std=0.5, seed=1)).double()


def on_ranks():
    mesh = Mesh(ep=2)
    return pass_through(parallelize(layer(), mesh), mesh, 13)


def test_two_ranks_do_what_one_does():
    assert_same(run_on_ranks(2, on_ranks), pass_through(layer(), Mesh(), 13))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k must be between 1 and num_experts=4"),
        ({"k": 0}, "k must be between"),
        ({"k": 1.0}, "k must be a whole number, got 1.0"),
        ({"k": 1, "init_std": -1.0}, "init_std must be a finite number of at least 0, got -1.0"),
        ({"k": 1, "rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SinkhornRouter(4, 4, **arguments)


def test_the_same_seed_gives_the_same_weights():
    assert torch.equal(
        SinkhornRouter(8, 4, 1, seed=3).weight_ED, SinkhornRouter(8, 4, 1, seed=3).weight_ED
    )
    assert SinkhornRouter(8, 4, 1).leaks


def test_losses_have_names_of_their_own():
    with pytest.raises(ValueError, match="losses must have different names"):
        SinkhornRouter(4, 4, 2, losses=(ZLoss(coef=0.1), ZLoss(coef=0.2)))
