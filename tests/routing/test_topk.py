import math
import re

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.routing import (
    Capacity,
    GroupLimit,
    LearnedNoise,
    NormalNoise,
    RandomSecond,
    Routing,
    SelectionBias,
    ThresholdSecond,
    TopKRouter,
    ZLoss,
)

close = {"atol": 1e-6, "rtol": 0}


def weights(routing):
    return routing.weight_TK[0].tolist()


def test_reference_softmax_weights(one_token, identity_router):
    raw = identity_router(2)(one_token)
    assert raw.expert_TK.tolist() == [[0, 1]]
    assert weights(raw) == pytest.approx([0.643914, 0.236883], abs=1e-6)
    shared = identity_router(2, renormalize="chosen")(one_token)
    assert weights(shared) == pytest.approx([0.731059, 0.268941], abs=1e-6)


def test_reference_sigmoid_weights(one_token, identity_router):
    raw = identity_router(4, score="sigmoid")(one_token)
    assert weights(raw) == pytest.approx([0.880797, 0.731059, 0.5, 0.268941], abs=1e-6)
    pair = identity_router(2, score="sigmoid", renormalize="chosen")(one_token)
    assert weights(pair) == pytest.approx([0.546449, 0.453551], abs=1e-6)
    scaled = identity_router(2, score="sigmoid", renormalize="chosen", scale=2.5)(one_token)
    assert weights(scaled) == pytest.approx([1.366123, 1.133877], abs=1e-6)


def test_reference_selection_bias(one_token, identity_router):
    router = identity_router(2, score="sigmoid", renormalize="chosen", bias=SelectionBias(4))
    router.bias.bias_E.copy_(torch.tensor([-0.3, 0.0, 0.2, 0.0]))
    routing = router(one_token)
    assert sorted(routing.expert_TK[0].tolist()) == [1, 2]
    assert weights(routing) == pytest.approx([0.593845, 0.406155], abs=1e-6)


def test_bias_never_changes_the_weights_of_an_unchanged_selection(identity_router):
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    router = identity_router(2, 6, score="sigmoid", renormalize="chosen", bias=SelectionBias(6))
    plain = router(x)
    router.bias.bias_E.copy_(torch.linspace(-0.2, 0.2, 6))
    biased = router(x)
    same_T = (plain.expert_TK.sort(1).values == biased.expert_TK.sort(1).values).all(1)
    assert 0 < same_T.sum() < 50

    def spread(r):
        return torch.zeros(50, 7, dtype=torch.float64).scatter(1, r.expert_TK, r.weight_TK)

    torch.testing.assert_close(spread(plain)[same_T], spread(biased)[same_T], rtol=0, atol=0)


def test_gshard_walk_through(four_tokens, identity_router):
    class FixedCapacity(Capacity):
        def slots(self, group_size, num_experts, k, *, training):
            return 2

    router = identity_router(2, renormalize="chosen", capacity=FixedCapacity(factor=1.0))
    routing = router(four_tokens)
    assert routing.chosen_TK.tolist() == [[0, 1], [1, 0], [0, 2], [0, 1]]
    assert routing.expert_TK.tolist() == [[0, 1], [1, 4], [0, 2], [4, 4]]
    assert routing.num_dropped == 3
    assert routing.load_E.tolist() == [4, 3, 1, 0]
    # A surviving choice keeps the share it had before dropping; token 3 has the residual alone.
    assert weights(routing) == pytest.approx([0.731059, 0.268941], abs=1e-6)
    assert routing.weight_TK[1].tolist() == pytest.approx([0.731059, 0.0], abs=1e-6)
    assert routing.weight_TK[3].tolist() == [0.0, 0.0]
    kept = identity_router(2, renormalize="kept", capacity=FixedCapacity(factor=1.0))(four_tokens)
    assert kept.weight_TK[1].tolist() == [1.0, 0.0]
    assert kept.weight_TK[3].tolist() == [0.0, 0.0]


def test_random_second_is_kept_as_often_as_the_formula_says(one_token, identity_router):
    router = identity_router(2, renormalize="chosen", skip=RandomSecond(0.5)).train()
    torch.manual_seed(0)
    routing = router(one_token.expand(20_000, 4))
    kept = (routing.expert_TK[:, 1] == 1).double().mean()
    assert kept == pytest.approx(0.537883, abs=0.01)
    assert (routing.expert_TK[:, 0] == 0).all()
    assert routing.num_dropped == 0
    assert routing.load_E.sum() == (routing.expert_TK < 4).sum()
    assert (router.eval()(one_token).expert_TK == torch.tensor([[0, 1]])).all()


def test_threshold_second(one_token, identity_router):
    assert identity_router(2, skip=ThresholdSecond(0.2))(one_token).expert_TK.tolist() == [[0, 1]]
    assert identity_router(2, skip=ThresholdSecond(0.37))(one_token).expert_TK.tolist() == [[0, 4]]


def test_group_limit_closes_groups(identity_router):
    x = torch.tensor([[5.0, -9.0, 1.0, 0.9, 0.0, 0.0, 2.0, 1.9]], dtype=torch.float64)
    limit = GroupLimit(num_groups=4, kept=1, score="max")
    assert identity_router(2, 8, group_limit=limit)(x).expert_TK.tolist() == [[0, 1]]
    limit = GroupLimit(num_groups=4, kept=1, score="top2_sum")
    router = identity_router(2, 8, score="sigmoid", group_limit=limit)
    assert router(x).expert_TK.tolist() == [[6, 7]]


def test_a_group_limit_knows_its_scores():
    with pytest.raises(ValueError, match=r"score must be one of max, top2_sum.*mean 'top2_sum'"):
        GroupLimit(num_groups=4, kept=1, score="top2sum")


@pytest.mark.parametrize("renormalize", ["no", "chosen", "kept"])
def test_priority_is_by_scores_before_they_are_renormalised(renormalize, identity_router):
    """Tutel's ``scores.max(dim=1)``; shared between the two, the second token's is the higher."""
    p = torch.tensor([[0.5, 0.4, 0.05, 0.05], [0.4, 0.1, 0.25, 0.25]], dtype=torch.float64)
    capacity = Capacity(factor=1.0, eval_factor=1.0, order="priority")
    router = identity_router(2, capacity=capacity, renormalize=renormalize)
    for training in (True, False):
        for order in ([0, 1], [1, 0]):
            served_TK = router.train(training)(p[order].log()).expert_TK
            assert served_TK[order.index(0)].tolist() == [0, 1]
            assert served_TK[order.index(1)].tolist() == [4, 2]


def test_scores_are_wide_under_autocast_and_in_half_models():
    x = torch.randn(5, 8)
    router = TopKRouter(8, 4, 2, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x.bfloat16())
    assert routing.weight_TK.dtype == routing.logits_TE.dtype == torch.float32
    assert router.bfloat16()(x.bfloat16()).weight_TK.dtype == torch.float32
    assert TopKRouter(8, 4, 2, seed=0, dtype=torch.float64)(x).weight_TK.dtype == torch.float64


def test_padding_takes_no_slot_and_enters_no_statistic():
    torch.manual_seed(0)
    x = torch.randn(12, 8, dtype=torch.float64)
    options = {
        "capacity": Capacity(factor=1.0),
        "losses": (ZLoss(coef=1.0),),
        "bias": SelectionBias(4),
        "dtype": torch.float64,
    }
    router = TopKRouter(8, 4, 2, seed=0, **options)
    mask = torch.zeros(12, dtype=torch.bool)
    mask[[0, 3, 4, 11]] = True
    x[mask] = torch.nan
    padded = router(x, padding_mask=mask)
    assert (padded.expert_TK[mask] == 4).all()
    assert (padded.weight_TK[mask] == 0).all()
    assert padded.load_E.sum() == 16 == router.bias.count_E.sum()
    alone = TopKRouter(8, 4, 2, seed=0, **{**options, "capacity": None, "bias": None})(x[~mask])
    assert torch.equal(padded.chosen_TK[~mask], alone.chosen_TK)
    torch.testing.assert_close(padded.losses["z"], alone.losses["z"])
    padded.losses["z"].backward()
    assert router.weight_ED.grad.isfinite().all()


@pytest.mark.parametrize("padding", [True, False])
def test_no_tokens_and_all_padding(padding):
    from expertmesh.routing import ImportanceLoss, LoadBalancingLoss

    tokens = 3 if padding else 0
    losses = (ZLoss(coef=1.0), LoadBalancingLoss(coef=1.0), ImportanceLoss(coef=1.0))
    router = TopKRouter(8, 4, 2, capacity=Capacity(factor=1.0), losses=losses)
    x = torch.randn(tokens, 8, requires_grad=True)
    routing = router(x, padding_mask=torch.ones(tokens, dtype=torch.bool))
    assert routing.expert_TK.shape == (tokens, 2)
    total = sum(routing.losses.values())
    assert total == 0
    total.backward()
    assert router.weight_ED.grad.isfinite().all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_extreme_logits_stay_finite(score):
    x = torch.eye(4, dtype=torch.float64) * 1e4
    x = torch.cat([x, -x]).requires_grad_()
    router = TopKRouter(4, 4, 2, score=score, renormalize="chosen", losses=(ZLoss(coef=1e-3),))
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4))
    routing = router(x)
    (routing.weight_TK.sum() + routing.losses["z"]).backward()
    assert routing.weight_TK.isfinite().all()
    assert x.grad.isfinite().all()


def test_replay_takes_ids_and_computes_weights_with_gradient():
    torch.manual_seed(0)
    x = torch.randn(40, 8, dtype=torch.float64)
    for options in (
        {},
        {"renormalize": "chosen", "capacity": Capacity(factor=0.7)},
        {"renormalize": "kept", "capacity": Capacity(factor=0.7), "skip": RandomSecond(0.5)},
        {"noise": NormalNoise()},
    ):
        router = TopKRouter(8, 4, 2, seed=0, dtype=torch.float64, **options)
        recorded = router(x)
        clean = TopKRouter(8, 4, 2, seed=0, dtype=torch.float64, **{**options, "noise": None})
        again = clean(x, routing=recorded)
        for name in ("expert_TK", "chosen_TK", "load_E", "num_dropped"):
            assert torch.equal(getattr(again, name), getattr(recorded, name))
        assert again.dropped_TK is recorded.dropped_TK
        if "noise" not in options:
            assert torch.equal(again.weight_TK, recorded.weight_TK)
        other = TopKRouter(8, 4, 2, seed=1, dtype=torch.float64, **{**options, "noise": None})
        replayed = other(x, routing=recorded)
        assert torch.equal(replayed.expert_TK, recorded.expert_TK)
        assert not torch.equal(replayed.weight_TK, recorded.weight_TK)
        (replayed.weight_TK**2).sum().backward()
        assert other.weight_ED.grad.abs().sum() > 0


def test_routing_is_a_pytree():
    import torch.utils._pytree as pytree

    routing = TopKRouter(8, 4, 2, losses=(ZLoss(coef=1.0),))(torch.randn(3, 8))
    leaves, spec = pytree.tree_flatten(routing)
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert isinstance(rebuilt, Routing)
    assert rebuilt.losses["z"] is routing.losses["z"]
    assert rebuilt.num_experts == 4


def test_evaluation_is_deterministic_and_without_losses():
    options = {"noise": NormalNoise(), "losses": (ZLoss(coef=1.0),)}
    router = TopKRouter(
        8, 4, 2, capacity=Capacity(factor=1, eval_factor=1, order="random"), **options
    )
    x = torch.randn(30, 8)
    first, second = router.eval()(x), router.eval()(x)
    assert torch.equal(first.expert_TK, second.expert_TK)
    assert first.losses == {}


def test_initial_values_follow_the_seed():
    one, same, other = (TopKRouter(8, 4, 2, seed=s).weight_ED for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(TopKRouter(8, 4, 2).weight_ED, TopKRouter(8, 4, 2).weight_ED)
    meta = TopKRouter(8, 4, 2, noise=LearnedNoise(8, 4, device="meta"), device="meta")
    meta.to_empty(device="cpu").reset_parameters(0)
    assert torch.equal(meta.weight_ED, one)
    assert (meta.noise.weight_ED == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 5}, "k must be between 1 and num_experts=4, got 5; set k <= 4"),
        ({"k": 0}, "k must be between 1"),
        ({"k": 1, "renormalize": "chosen"}, "set renormalize='no' or k >= 2"),
        ({"k": 1, "renormalize": "kept"}, "set renormalize='no' or k >= 2"),
        ({"k": 2.0}, "k must be a whole number, got 2.0"),
        ({"k": 2, "scale": -1.0}, "scale must be a finite number above 0, got -1.0"),
        ({"k": 2, "scale": None}, "scale must be a finite number above 0, got None"),
        ({"k": 2, "init_std": "0.1"}, "init_std must be a finite number of at least 0, got '0.1'"),
        ({"k": 2, "scale": math.nan}, "scale must be a finite number above 0, got nan"),
        ({"k": 2, "init_std": -0.1}, "init_std must be a finite number of at least 0, got -0.1"),
        ({"k": 2, "init_std": math.nan}, "init_std must be a finite number of at least 0, got nan"),
        ({"k": 2, "skip": 0.2}, "skip must be a SkipRule or None, got 0.2; set skip=ThresholdSec"),
        ({"k": 2, "noise": 0.1}, "noise must be a Noise or None, got 0.1; set noise=NormalNoise()"),
        ({"k": 2, "capacity": 1.25}, "got 1.25; set capacity=Capacity(factor=1.25)"),
        ({"k": 2, "bias": 1e-3}, "bias must be a SelectionBias or None, got 0.001"),
        ({"k": 2, "group_limit": 4}, "got 4; set group_limit=GroupLimit(num_groups=8, kept=4)"),
        ({"k": 2, "bias": SelectionBias(1)}, "got SelectionBias(1); set SelectionBias(4)"),
        ({"k": 2, "noise": LearnedNoise(8, 1)}, "got LearnedNoise(8, 1); set LearnedNoise(8, 4)"),
        ({"k": 2, "noise": LearnedNoise(7, 4)}, "got LearnedNoise(7, 4); set LearnedNoise(8, 4)"),
        ({"k": 2, "score": "softmx"}, "did you mean 'softmax'"),
        ({"k": 2, "renormalize": True}, "renormalize must be"),
        ({"k": 2, "losses": (ZLoss(coef=1.0), ZLoss(coef=2.0))}, "different names"),
        ({"k": 2, "group_limit": GroupLimit(num_groups=3, kept=1)}, "multiple of num_groups=3"),
        ({"k": 3, "group_limit": GroupLimit(num_groups=2, kept=1)}, "k must be at most 2"),
        ({"k": 2, "group_limit": GroupLimit(num_groups=4, kept=2)}, "set score='max'"),
        ({"k": 2, "group_limit": GroupLimit(num_groups=2, kept=3)}, "between 1 and num_groups=2"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TopKRouter(8, 4, **arguments)
