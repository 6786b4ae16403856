"""Choices drawn by Gumbel noise: as often as probabilities say, in training only."""

import pytest
import torch

from expertmesh.random import RandomKey
from expertmesh.routing import Capacity, SelectionBias, TopKRouter, router_preset

SAMPLES = 20_000
P = [0.643914, 0.236883, 0.087144, 0.032059]


def drawn(router, one_token, step=1):
    key = RandomKey.of(0, step, torch.arange(SAMPLES))
    return router(one_token.expand(SAMPLES, 4), key=key)


def test_the_second_is_drawn_from_the_rest(one_token, identity_router):
    router = identity_router(2, sampling="second")
    routing = drawn(router, one_token)
    assert (routing.expert_TK[:, 0] == 0).all()
    shares = torch.bincount(routing.expert_TK[:, 1], minlength=4) / SAMPLES
    expected = [0.0, *(p / (1 - P[0]) for p in P[1:])]
    assert shares.tolist() == pytest.approx(expected, abs=4 * (0.25 / SAMPLES) ** 0.5)


def test_all_are_drawn_without_replacement(one_token, identity_router):
    routing = drawn(identity_router(2, sampling="all"), one_token)
    shares = torch.bincount(routing.expert_TK[:, 0], minlength=4) / SAMPLES
    assert shares.tolist() == pytest.approx(P, abs=4 * (0.25 / SAMPLES) ** 0.5)
    pairs = torch.zeros(4, 4).index_put(
        tuple(routing.expert_TK.T), torch.full((SAMPLES,), 1 / SAMPLES), accumulate=True
    )
    expected = [[0 if i == j else P[i] * P[j] / (1 - P[i]) for j in range(4)] for i in range(4)]
    torch.testing.assert_close(pairs, torch.tensor(expected), atol=0.015, rtol=0)


@pytest.mark.parametrize("sampling", ["second", "all"])
def test_weights_are_those_of_the_scores(sampling, one_token, identity_router):
    routing = drawn(identity_router(2, sampling=sampling), one_token)
    expected = torch.tensor(P, dtype=torch.float64)[routing.expert_TK]
    torch.testing.assert_close(routing.weight_TK, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sampling", ["second", "all"])
def test_evaluation_takes_the_best(sampling, one_token, identity_router):
    router = identity_router(2, sampling=sampling)
    assert (drawn(router.eval(), one_token).expert_TK == torch.tensor([0, 1])).all()


def test_draws_follow_the_step_and_not_the_order(one_token, identity_router):
    router = identity_router(2, sampling="all")
    first, again, later = (drawn(router, one_token, step).expert_TK for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
    key = RandomKey(RandomKey.of(0, 1, order).seed, order)
    moved = router(one_token.expand(SAMPLES, 4), key=key)
    assert torch.equal(moved.expert_TK, first[order])


def test_extreme_logits_and_padding(identity_router):
    x = torch.tensor([[1e4, -1e4, 0.0, 1e4]] * 50, dtype=torch.float64).requires_grad_()
    mask = torch.arange(50) % 3 == 0
    for sampling in ("second", "all"):
        router = identity_router(3, sampling=sampling)
        routing = router(x, padding_mask=mask)
        assert (routing.expert_TK[mask] == 4).all()
        assert all(len(set(row)) == 3 for row in routing.expert_TK[~mask].tolist())
        routing.weight_TK.sum().backward()
        assert x.grad.isfinite().all()


def deepspeed_top2(logits, noise, capacity):
    """DeepSpeed's gate for two choices by its published steps, a token at a time."""
    num_tokens, num_experts = logits.shape
    p = logits.softmax(1)
    first = p.argmax(1).tolist()
    second = (logits + noise).masked_fill(
        torch.nn.functional.one_hot(p.argmax(1), num_experts).bool(), -torch.inf
    )
    second = second.argmax(1).tolist()
    taken, kept = [0] * num_experts, torch.zeros(num_tokens, 2)
    for k, choice in enumerate((first, second)):
        for t, e in enumerate(choice):
            kept[t, k] = taken[e] < capacity
            taken[e] += 1
    gates = torch.stack([p[range(num_tokens), first], p[range(num_tokens), second]], 1) * kept
    weights = gates / gates.sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).eps)
    share = torch.nn.functional.one_hot(torch.tensor(first), num_experts).double().mean(0)
    balance = (p.mean(0) * share).mean() * num_experts**2
    return torch.tensor([first, second]).T, weights, balance


def test_the_preset_is_deepspeeds_gate_for_two(monkeypatch):
    num_tokens, num_experts = 40, 8
    router = router_preset("deepspeed_top2", dim=6, num_experts=num_experts, seed=0, init_std=2.0)
    router.double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_tokens, 6, dtype=torch.float64, generator=generator)
    noise = torch.randn(num_tokens, num_experts, dtype=torch.float64, generator=generator)
    monkeypatch.setattr("expertmesh.routing.sampling.gumbel", lambda *_: noise)
    routing = router(x)
    capacity = max(4, -(-num_tokens * 2 // num_experts))
    chosen, weights, balance = deepspeed_top2(x @ router.weight_ED.T, noise, capacity)
    assert routing.num_dropped > 0
    assert torch.equal(routing.chosen_TK, chosen)
    torch.testing.assert_close(routing.weight_TK, weights)
    torch.testing.assert_close(routing.losses["balance"] / 0.01, balance)


def test_the_top_1_preset_takes_it_as_an_option():
    router = router_preset("deepspeed", dim=4, num_experts=4, sampling="all", seed=0)
    x, key = torch.zeros(4000, 4), RandomKey.of(0, 1, torch.arange(4000))
    shares = router(x, key=key).load_E / 4000
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert router.eval()(x).load_E.tolist() == [4000, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "secnd"}, "sampling must be one of no, second, all.*did you mean 'second'"),
        ({"sampling": "second", "k": 1}, "k=1 has none; set k to 2 or more"),
        ({"sampling": "all", "bias": SelectionBias(4)}, "leave bias and group_limit out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(4, 4, **{"k": 2, "capacity": Capacity(factor=1.0), **options})
