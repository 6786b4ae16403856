"""Exact identities of MoE layers, on drawn shapes, ties and extreme logits, in float64."""

from typing import get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from expertmesh.experts import GatedMLPExperts, ModuleExperts
from expertmesh.layer import MoE
from expertmesh.routing import (
    Capacity,
    GroupLimit,
    ImportanceLoss,
    LoadBalancingLoss,
    RandomSecond,
    SelectionBias,
    ThresholdSecond,
    TopKRouter,
    ZLoss,
)
from expertmesh.routing.capacity import FORMULAS
from expertmesh.routing.losses import Importance, smooth_load
from expertmesh.routing.noise import NoisyLogits
from expertmesh.soft_moe import SoftMoE
from expertmesh.testing import assert_close

SMALL = settings(deadline=None, max_examples=15, derandomize=True)
SEEDS = st.integers(0, 1 << 30)
ORDERS = ("position", "token", "priority", "probability", "random")


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@st.composite
def logits(draw, kinds=("spread", "ties", "extreme"), least=0):
    """``(T, E)``: of all different values, of few values, or of -1e4, 0 and 1e4."""
    num_tokens, num_experts = draw(st.integers(least, 9)), draw(st.integers(1, 6))
    kind, values = draw(st.sampled_from(kinds)), normal(draw(SEEDS), num_tokens, num_experts)
    if kind == "ties":
        return values.round()
    return 1e4 * values.sign() * (values.abs() > 0.5) if kind == "extreme" else values


@st.composite
def choices(draw, **options):
    """Logits and a k that fits them."""
    logits_TE = draw(logits(**options))
    return logits_TE, draw(st.integers(1, logits_TE.shape[1]))


def router_of(num_experts, k, **options):
    """A router whose logits are its input."""
    if k == 1:
        options.pop("renormalize", None)
    router = TopKRouter(num_experts, num_experts, k, dtype=torch.float64, **options)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router


def layer_of(num_experts, k, seed=0, **options):
    experts = GatedMLPExperts(num_experts, 5, num_experts, init_std=0.5, seed=seed)
    return MoE(router_of(num_experts, k, **options), experts.double())


def expert(experts, index, x):
    """One expert by its definition."""
    gate, up = experts.gate_up[index]
    return functional.linear(
        functional.silu(functional.linear(x, gate)) * functional.linear(x, up), experts.down[index]
    )


def alike(experts):
    """Every expert a copy of the first: what upcycling a dense model makes."""
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


@SMALL
@given(st.integers(0, 7), st.sampled_from([1.0, 1e4]), SEEDS)
def test_one_expert_with_its_raw_weight_is_the_expert(num_tokens, scale, seed):
    moe, x = layer_of(1, 1, seed), scale * normal(seed, num_tokens, 1)
    assert_close("output", moe(x), expert(moe.experts, 0, x))


@SMALL
@given(choices(), st.sampled_from(["softmax", "sigmoid"]))
def test_equal_experts_with_weights_that_sum_to_one_are_the_dense_model(drawn, score):
    x, k = drawn
    assume(k > 1)  # the weight of one choice is its raw score
    moe = layer_of(x.shape[1], k, score=score, renormalize="chosen")
    alike(moe.experts)
    y = moe(x)
    # A sigmoid of -1e4 is 0: a token that all experts score so has no weight to share out.
    scored_T = (x.sigmoid() > 0).any(1) if score == "sigmoid" else torch.ones(len(x)).bool()
    assert_close("dense", y[scored_T], expert(moe.experts, 0, x)[scored_T])
    assert (y[~scored_T] == 0).all()


@SMALL
@given(choices())
def test_the_layer_is_a_loop_over_tokens(drawn):
    x, k = drawn
    moe = layer_of(x.shape[1], k)
    y, p_TE = moe(x), x.softmax(1)
    for t in range(len(x)):
        best = sorted(range(x.shape[1]), key=lambda e: (-float(p_TE[t, e]), e))[:k]
        expected = sum(p_TE[t, e] * expert(moe.experts, e, x[t : t + 1])[0] for e in best)
        assert_close(f"token {t}", y[t], expected)


@SMALL
@given(choices(), st.sampled_from(ORDERS), st.sampled_from(sorted(FORMULAS)))
def test_capacity_without_end_is_dropless(drawn, order, formula):
    x, k = drawn
    factor = 10.0 * x.shape[1] * k
    roomy = layer_of(x.shape[1], k, capacity=Capacity(factor=factor, order=order, formula=formula))
    y, routing = roomy(x, return_routing=True)
    assert routing.num_dropped == 0
    assert torch.equal(y, layer_of(x.shape[1], k)(x))


class NoSlots(Capacity):
    def slots(self, group_size, num_experts, k, *, training):
        return 0


@SMALL
@given(choices(least=1), st.sampled_from(ORDERS))
def test_where_all_is_dropped_the_residual_alone_is_left(drawn, order):
    x, k = drawn
    losses = (ZLoss(coef=1e-3), LoadBalancingLoss(coef=1e-2))
    moe = layer_of(x.shape[1], k, capacity=NoSlots(factor=1.0, order=order), losses=losses)
    x = x.clone().requires_grad_()
    y, routing = moe(x, return_routing=True)
    assert routing.num_dropped == len(x) * k
    assert (y == 0).all()
    (x + y).square().sum().backward()
    for name, parameter in moe.experts.named_parameters():
        assert (parameter.grad == 0).all(), name
    assert moe.router.weight_ED.grad.isfinite().all()
    assert all(loss.isfinite() for loss in routing.losses.values())
    assert x.grad.isfinite().all()


@SMALL
@given(st.integers(2, 6), st.integers(1, 4), st.data())
def test_balance_losses_at_balance(num_experts, rounds, data):
    k = data.draw(st.integers(1, num_experts))
    base_E = normal(data.draw(SEEDS), num_experts)
    # Every expert stands at every place of the same logits equally often.
    x = torch.stack([base_E.roll(t) for t in range(num_experts * rounds)])
    at_balance = {
        "switch": 1.0,
        "megablocks": 1.0,
        "huggingface": float(k),
        "gshard_paper": 1 / num_experts**2,
        "deepseek_v3": 1.0,
    }
    losses = [LoadBalancingLoss(coef=1.0, form=form, name=form) for form in at_balance]
    losses += [ImportanceLoss(coef=1.0, of=of, name=of) for of in get_args(Importance)]
    for score in ("softmax", "sigmoid"):
        found = router_of(num_experts, k, score=score, losses=losses)(x).losses
        for name, value in found.items():
            assert value.item() == pytest.approx(at_balance.get(name, 0.0), abs=1e-9), name


@settings(deadline=None, max_examples=6, derandomize=True)
@given(st.integers(2, 6), st.floats(0.2, 2.0), SEEDS, st.data())
def test_chances_of_being_chosen_sum_to_k_in_expectation(num_experts, std, seed, data):
    k, samples = data.draw(st.integers(1, num_experts)), 20_000
    clean_TE = normal(seed, 1, num_experts).expand(samples, -1)
    noisy_TE = clean_TE + std * normal(seed + 1, samples, num_experts)
    std_TE = torch.full((1, 1), std, dtype=torch.float64)
    chance_TE = smooth_load(NoisyLogits(clean_TE, noisy_TE, std_TE), k)
    assert ((chance_TE >= 0) & (chance_TE <= 1)).all()
    # Six standard errors: a chance lies in [0, 1], a sum of E of them spreads by less than E / 2.
    assert float(chance_TE.sum(1).mean()) == pytest.approx(
        k, abs=6 * num_experts / 2 / samples**0.5
    )


@SMALL
@given(choices(), SEEDS)
def test_a_selection_bias_leaves_the_weights_of_the_same_selection_alone(drawn, seed):
    x, k = drawn
    num_experts = x.shape[1]
    options = {"score": "sigmoid", "renormalize": "chosen", "scale": 2.5}
    router = router_of(num_experts, k, bias=SelectionBias(num_experts), **options)
    plain = router(x)
    router.bias.bias_E.copy_(0.3 * normal(seed, num_experts))
    biased = router(x)
    same_T = (plain.expert_TK.sort(1).values == biased.expert_TK.sort(1).values).all(1)

    def by_expert(routing):
        spread = torch.zeros(len(x), num_experts + 1, dtype=torch.float64)
        return spread.scatter(1, routing.expert_TK, routing.weight_TK)[same_T]

    assert_close("weights", by_expert(biased), by_expert(plain), 1e-15)


@SMALL
@given(choices(kinds=("spread",)), SEEDS)
def test_the_experts_order_does_not_matter(drawn, seed):
    x, k = drawn
    moe = layer_of(x.shape[1], k, renormalize="chosen")
    y = moe(x)
    order_E = normal(seed, x.shape[1]).argsort()
    with torch.no_grad():
        for parameter in (moe.router.weight_ED, *moe.experts.parameters()):
            parameter.copy_(parameter[order_E])
    assert_close("output", moe(x), y)


@SMALL
@given(choices(), SEEDS)
def test_the_tokens_order_does_not_matter_without_a_capacity(drawn, seed):
    x, k = drawn
    moe, order_T = layer_of(x.shape[1], k), normal(seed, len(x)).argsort()
    assert_close("output", moe(x[order_T]), moe(x)[order_T])


def test_the_tokens_order_matters_with_a_capacity_by_position():
    class OneSlot(Capacity):
        def slots(self, group_size, num_experts, k, *, training):
            return 1

    x = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    moe = layer_of(2, 1, capacity=OneSlot(factor=1.0))
    assert (moe(x)[1] == 0).all()
    assert (moe(x.flip(0))[1] == 0).all()  # the other token, in the same place


@SMALL
@given(st.integers(1, 6), st.integers(2, 6), st.data())
def test_an_upcycled_layer_begins_as_the_dense_one(num_tokens, num_experts, data):
    k = data.draw(st.integers(2, num_experts))
    x = normal(data.draw(SEEDS), num_tokens, num_experts)
    capacity = data.draw(st.sampled_from([None, Capacity(factor=100.0)]))
    moe = layer_of(num_experts, k, renormalize="chosen", capacity=capacity)
    alike(moe.experts)
    assert_close("step 0", moe(x), expert(moe.experts, 0, x))
    raw = layer_of(num_experts, num_experts)
    alike(raw.experts)  # raw probabilities of all experts sum to 1 too
    assert_close("all experts", raw(x), expert(raw.experts, 0, x))


@SMALL
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 1e4]), SEEDS)
def test_soft_moe_mixes_with_weights_that_sum_to_one(length, num_experts, slots, scale, seed):
    def linear_experts():
        return ModuleExperts(lambda: torch.nn.Linear(3, 3), num_experts, dim=3, seed=seed).double()

    x = scale * normal(seed, 2, length, 3)
    constant = linear_experts()
    with torch.no_grad():
        constant.stacked.weight.zero_()
        constant.stacked.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
    # Every slot answers the same vector: what a token takes of the slots sums to one.
    y = SoftMoE(constant, slots, seed=seed)(x)
    assert_close("rows of C", y, torch.tensor([1.0, -2.0, 3.0]).double().expand_as(y))
    same = linear_experts()
    alike(same)
    # Every token is the same vector: so is every slot's mixture of them.
    token = x[:1, :1].expand_as(x)
    expected = functional.linear(token, same.stacked.weight[0], same.stacked.bias[0])
    assert_close("columns of D", SoftMoE(same, slots, seed=seed)(token), expected)


OPTIONS = {
    "raw": {},
    "renormalised": {"renormalize": "chosen"},
    "sigmoid": {"score": "sigmoid", "renormalize": "chosen", "scale": 2.5},
    "kept": {"renormalize": "kept", "capacity": Capacity(factor=0.7)},
    "random second": {"renormalize": "chosen", "skip": RandomSecond(0.5)},
    "threshold": {"skip": ThresholdSecond(0.2), "capacity": Capacity(factor=0.7, order="priority")},
    "groups": {"group_limit": GroupLimit(num_groups=1, kept=1, score="max")},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@SMALL
@given(choices())
def test_ties_and_extreme_logits_give_whole_numbers_and_finite_gradients(options, drawn):
    x, k = drawn
    x = x.clone().requires_grad_()
    num_experts = x.shape[1]
    losses = [LoadBalancingLoss(coef=1.0), ZLoss(coef=1e-6), ImportanceLoss(coef=1.0)]
    router = router_of(num_experts, k, losses=losses, **options)
    routing = router(x)
    served_TK = routing.expert_TK < num_experts
    assert (routing.weight_TK[~served_TK] == 0).all()
    assert (routing.weight_TK >= 0).all()
    if routing.dropped_TK is not None:
        assert not (served_TK & routing.dropped_TK).any()
    assert routing.load_E.sum() == served_TK.sum() + routing.num_dropped
    score_TE = x.sigmoid() if options.get("score") == "sigmoid" else x.softmax(1)
    for row, chosen in zip(score_TE.tolist(), routing.chosen_TK.tolist(), strict=True):
        assert chosen == sorted(range(num_experts), key=lambda e: (-row[e], e))[:k]
    (routing.weight_TK.sum() + sum(routing.losses.values())).backward()
    for value in (routing.weight_TK, x.grad, router.weight_ED.grad, *routing.losses.values()):
        assert value.isfinite().all()
