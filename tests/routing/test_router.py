"""What every family of routers keeps to."""

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import Capacity, TopKRouter
from expertmesh.testing import run_on_ranks
from tests.distributed.layers import DIM, assert_same, tokens
from tests.routing.families import FAMILIES, E, see, see_on_mesh, token_ids

FALL_SHORT = {"expert_choice", "expert_choice_sequence", "expert_choice_cap", "batchwise"}
"""Take no tokens where there are fewer than experts."""

families = pytest.mark.parametrize("name", FAMILIES)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def call(router, x_TD, ids_T=None, **arguments):
    ids_T = token_ids(len(x_TD)) if ids_T is None else ids_T
    return router(x_TD, token_ids=ids_T, **{"sequence_length": 3, **arguments})


def rows(routing, num_tokens):
    """Weights by token and expert, ``(T, E)``: what a routing means, whatever its form."""
    token_N = torch.arange(num_tokens) if routing.token_N is None else routing.token_N
    out = routing.weight_TK.new_zeros(num_tokens, E + 1)
    token_NK = token_N[:, None].expand_as(routing.expert_TK)
    return out.index_put((token_NK, routing.expert_TK), routing.weight_TK, accumulate=True)[:, :E]


def same(first, second):
    names = ("expert_TK", "chosen_TK", "weight_TK", "load_E", "dropped_TK", "token_N")
    pairs = [(getattr(first, name), getattr(second, name)) for name in names]
    return all(
        one is two if one is None or two is None else torch.equal(one, two) for one, two in pairs
    )


@families
@modes
def test_numbers_are_a_function_of_key_and_place(name, training):
    router, x = FAMILIES[name]().train(training), tokens(12)
    keys = [RandomKey.of(0, step, torch.arange(12)) for step in (1, 1, 2)]
    first, again, later = (call(router, x, key=key) for key in keys)
    assert same(first, again)
    if not training:
        assert same(first, later)
    assert first.weight_TK.dtype in (torch.float64, torch.float32)
    assert (
        first.load_E.tolist() == torch.bincount(first.chosen_TK.flatten(), minlength=E)[:E].tolist()
    )
    assert (first.weight_TK[first.expert_TK == E] == 0).all()


@families
@modes
def test_no_tokens_and_one(name, training):
    moe = MoE(FAMILIES[name]().train(training), MLPExperts(DIM, 6, E, seed=0).double())
    ids = token_ids(1).view(1, 1)
    y, routing = moe(tokens(0).view(0, 1, DIM), token_ids=ids[:0], return_routing=True)
    assert y.shape == (0, 1, DIM)
    assert routing.load_E.tolist() == [0] * E
    assert all(loss == 0 for loss in routing.losses.values())
    one = tokens(1).view(1, 1, DIM)
    if name in FALL_SHORT and not (name == "batchwise" and not training):
        field = "k" if name == "batchwise" else "factor"
        with pytest.raises(ValueError, match=f"rounds to zero; set {field} to at least 4"):
            moe(one, token_ids=ids)
        return
    moe(one, token_ids=ids).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


@families
@modes
def test_padding_takes_no_slot_and_spoils_nothing(name, training):
    router, x, ids = FAMILIES[name]().train(training), tokens(24), token_ids(24)
    mask = torch.zeros(24, dtype=torch.bool)
    mask[[2, 5, 8, 10, 11, 23]] = True
    x[mask], ids[mask] = torch.nan, -1
    key = RandomKey.of(0, 1, torch.arange(24))
    padded = call(router, x, ids, padding_mask=mask, key=key)
    table = rows(padded, 24)
    assert (table[mask] == 0).all()
    assert table.isfinite().all()
    other = x.clone()
    other[mask] = 1e4
    assert same(padded, call(router, other, ids, padding_mask=mask, key=key))
    total = padded.weight_TK.sum() + sum(padded.losses.values())
    if total.requires_grad:
        total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())
    everything = call(router, x, ids, padding_mask=torch.ones_like(mask), key=key)
    assert everything.load_E.sum() == 0
    assert all(loss.isfinite() for loss in everything.losses.values())


@families
def test_replay_takes_the_ids_and_computes_the_weights_with_gradient(name):
    router, x = FAMILIES[name](), tokens(12).requires_grad_()
    key = RandomKey.of(0, 1, torch.arange(12))
    first = call(router, x, key=key)
    assert same(first, call(router, x, key=key, routing=first))
    with torch.no_grad():
        for param in router.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    again = call(router, x, key=key, routing=first)
    assert torch.equal(again.expert_TK, first.expert_TK)
    assert torch.equal(again.chosen_TK, first.chosen_TK)
    if list(router.parameters()):
        assert not torch.allclose(again.weight_TK, first.weight_TK)
        (again.weight_TK * torch.arange(len(again.weight_TK))[:, None]).sum().backward()
        looked_at = router.task_GD if name == "per_task" else x  # which sees no token
        assert looked_at.grad.norm() > 0


def keep_decisions(ctx, op, *args, **kwargs):
    if op is torch.ops.expertmesh.decision.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@families
def test_recompute_does_not_decide_again(name):
    router, seen = FAMILIES[name](), []

    def run(x):
        routing = call(router, x)
        seen.append(routing)
        return (routing.weight_TK * x.square().sum()).sum()

    with set_checkpoint_early_stop(False):
        y = checkpoint(
            run,
            tokens(24).requires_grad_(),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(keep_decisions),
        )
    with torch.no_grad():
        for param in router.parameters():
            param.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(0)))
    y.backward()
    first, again = seen
    assert torch.equal(first.expert_TK, again.expert_TK)
    assert torch.equal(first.load_E, again.load_E)
    assert (first.token_N is None) or torch.equal(first.token_N, again.token_N)


@families
def test_scores_are_wide_under_autocast_and_in_half_models(name):
    router = FAMILIES[name]().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        routing = call(router, tokens(12).bfloat16())
    assert routing.weight_TK.dtype == torch.float32
    assert routing.logits_TE is None or routing.logits_TE.dtype == torch.float32


@families
def test_initial_values_are_a_function_of_the_seed(name):
    first, second = FAMILIES[name](), FAMILIES[name]()
    second.reset_parameters(5)
    drawn = [p for p in first.state_dict() if p.startswith(("weight", "proj", "direction"))]
    assert all(not torch.equal(first.state_dict()[n], second.state_dict()[n]) for n in drawn)
    first.reset_parameters(5)
    for value, expected in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.slow
def test_routers_compile_in_one_graph():
    key = RandomKey.of(0, 1, torch.arange(12))
    for name, make in FAMILIES.items():
        for training in (True, False):
            torch.compiler.reset()
            router = make().train(training)
            compiled = torch.compile(router, backend="eager", fullgraph=True)
            first, second = (call(r, tokens(12), key=key) for r in (compiled, router))
            assert torch.equal(first.expert_TK, second.expert_TK), name
            torch.testing.assert_close(first.weight_TK, second.weight_TK)


@pytest.mark.slow
def test_two_ranks_see_what_one_process_sees_in_training():
    ranks = run_on_ranks(2, see_on_mesh, True, timeout=240)
    for name in FAMILIES:
        print(name)
        assert_same([rank[name] for rank in ranks], see(name, Mesh(), True))


@pytest.mark.slow
def test_two_ranks_see_what_one_process_sees_in_evaluation():
    ranks = run_on_ranks(2, see_on_mesh, False, timeout=240)
    for name in FAMILIES:
        print(name)
        assert_same([rank[name] for rank in ranks], see(name, Mesh(), False))


@pytest.mark.parametrize(
    ("order", "k", "leaks"),
    [
        ("position", 1, False),
        ("position", 2, True),
        ("token", 2, False),
        ("priority", 1, True),
        ("probability", 1, True),
        ("random", 1, True),
    ],
)
def test_token_choice_leaks_by_the_order_of_its_capacity(order, k, leaks):
    router = TopKRouter(DIM, E, k, capacity=Capacity(factor=0.5, order=order))
    assert (router.leaks is not None) == leaks
    assert TopKRouter(DIM, E, k).leaks is None


@families
def test_what_does_not_leak_does_not_look_ahead(name):
    router = FAMILIES[name]()
    looked = []
    for seed in range(20):
        x = torch.randn(12, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        changed = torch.cat([x[:6], -x[6:]])
        key = RandomKey.of(0, 1, torch.arange(12))
        before, after = (
            rows(call(router, x, sequence_length=12, key=key), 12) for x in (x, changed)
        )
        looked.append(not torch.allclose(before[:6], after[:6], rtol=0, atol=1e-12))
    assert any(looked) == (router.leaks is not None)
