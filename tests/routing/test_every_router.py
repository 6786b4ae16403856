"""What every router promises, whatever its family."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.random import RandomKey
from expertmesh.testing import is_causal
from tests.routing.every_router import DIM, EVERY_ROUTER, NUM_EXPERTS, ids, router_named

IN_EVALUATION_TOO = {
    "position, k=2",
    "priority, k=1",
    "probability, k=2",
    "random order, k=1",
    "expert choice",
    "expert choice by sequence",
    "capped expert choice",
    "per sequence",
}
LEAKS = IN_EVALUATION_TOO | {"base", "batchwise", "sinkhorn"}

every_router = pytest.mark.parametrize("name", EVERY_ROUTER)


def layer(name):
    experts = MLPExperts(DIM, 8, NUM_EXPERTS, init_std=0.5, seed=0)
    return MoE(router_named(name), experts.double())


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_router_is_causal_or_says_why_not(name, training):
    x = torch.randn(2, 16, DIM, generator=torch.Generator().manual_seed(1))
    causal = is_causal(layer(name), x, training=training, token_ids=ids(2, 16))
    assert causal == (name not in (LEAKS if training else IN_EVALUATION_TOO))
    assert (router_named(name).leaks is None) == (name not in LEAKS)


@every_router
@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    num_rows=st.integers(1, 3),
    length=st.integers(4, 9),
    kind=st.sampled_from(["spread", "ties", "extreme"]),
    padded=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_whole_numbers_and_finite_gradients(name, num_rows, length, kind, padded, training, seed):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_rows * length
    x_TD = torch.randn(num_tokens, DIM, dtype=torch.float64, generator=generator)
    if kind != "spread":
        x_TD = x_TD.round() if kind == "ties" else 1e4 * x_TD.sign()
    mask_T = torch.rand(num_tokens, generator=generator) < 0.3 if padded else None
    router, leaf_TD = router_named(name).train(training), x_TD.requires_grad_()
    arguments = {
        "token_ids": ids(num_tokens, seed=seed),
        "padding_mask": mask_T,
        "sequence_length": length,
        "key": RandomKey.of(seed, 1, torch.arange(num_tokens)),
    }
    routing = router(leaf_TD, **arguments)
    check(routing, mask_T, num_tokens)
    again = router(leaf_TD, **arguments)
    assert torch.equal(again.expert_TK, routing.expert_TK)
    replayed = router(leaf_TD, **arguments, routing=dataclasses.replace(routing, losses={}))
    assert torch.equal(replayed.expert_TK, routing.expert_TK)
    assert torch.equal(replayed.weight_TK, routing.weight_TK)
    total = routing.weight_TK.sum() + sum(routing.losses.values())
    if total.requires_grad:
        total.backward()
        gradients = [leaf_TD.grad, *(p.grad for p in router.parameters())]
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


def check(routing, mask_T, num_tokens):
    """The fields agree with each other."""
    assert routing.num_experts == NUM_EXPERTS
    served_TK = routing.expert_TK < NUM_EXPERTS
    for ids_TK in (routing.expert_TK, routing.chosen_TK):
        assert ids_TK.dtype == torch.int64
        assert ((ids_TK >= 0) & (ids_TK <= NUM_EXPERTS)).all()
    assert routing.weight_TK.dtype == torch.float64
    assert routing.weight_TK.isfinite().all()
    assert (routing.weight_TK[~served_TK] == 0).all()
    assert torch.equal(routing.expert_TK[served_TK], routing.chosen_TK[served_TK])
    dropped_TK = routing.dropped_TK
    if dropped_TK is None:
        dropped_TK = torch.zeros_like(served_TK)
    asked_TK = torch.where(dropped_TK, routing.chosen_TK, routing.expert_TK)
    load_E = asked_TK.flatten().bincount(minlength=NUM_EXPERTS + 1)[:NUM_EXPERTS]
    assert torch.equal(routing.load_E, load_E)
    assert not (served_TK & dropped_TK).any()
    token_N = torch.arange(num_tokens) if routing.token_N is None else routing.token_N
    pairs = [
        (int(token), int(expert))
        for token, row in zip(token_N, routing.expert_TK, strict=True)
        for expert in row
        if expert < NUM_EXPERTS
    ]
    assert len(set(pairs)) == len(pairs)  # no token takes an expert twice
    if mask_T is not None:
        assert (routing.chosen_TK[mask_T[token_N]] == NUM_EXPERTS).all()
    if routing.most_per_expert is not None:
        counts_E = routing.expert_TK[served_TK].bincount(minlength=NUM_EXPERTS)
        assert counts_E.max() <= routing.most_per_expert


@every_router
def test_values_follow_the_seed_and_the_state_brings_them_back(name):
    x = torch.randn(2, 8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    one, other = layer(name).eval(), layer(name).eval()
    one.router.reset_parameters(7)
    other.router.reset_parameters(8)
    arguments = {"token_ids": ids(2, 8)}
    expected = one(x, **arguments)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x, **arguments), expected)
    other.router.reset_parameters(7)
    assert torch.equal(other(x, **arguments), expected)
