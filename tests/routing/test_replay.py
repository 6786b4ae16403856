import dataclasses

import pytest
import torch

from expertmesh.random import RandomKey
from expertmesh.routing import (
    BaseRouter,
    BatchwiseRouter,
    CosineRouter,
    ExpertChoiceRouter,
    FixedRouter,
    HashRouter,
    HierarchicalRouter,
    RoundRobinRouter,
    SinkhornRouter,
    ThorRouter,
    TopKRouter,
    UniformRouter,
)

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
TOKENS_CHOOSE = {
    "top-k": lambda num_experts: TopKRouter(4, num_experts, 2),
    "cosine": lambda num_experts: CosineRouter(4, num_experts, 2, proj_dim=3),
    "base": lambda num_experts: BaseRouter(4, num_experts),
    "sinkhorn": lambda num_experts: SinkhornRouter(4, num_experts, 2),
    "hierarchical": lambda num_experts: HierarchicalRouter(4, num_experts, num_groups=2),
    "fixed": lambda num_experts: FixedRouter(4, num_experts),
}


@pytest.mark.parametrize("name", TOKENS_CHOOSE)
def test_records_of_other_routers_are_refused(name):
    router = TOKENS_CHOOSE[name](4)
    with pytest.raises(ValueError, match="a router of num_experts=4, got one of 8"):
        router(X, routing=TopKRouter(4, 8, 2)(X))
    with pytest.raises(ValueError, match="in which tokens choose, got one in which experts do"):
        router(X, routing=ExpertChoiceRouter(4, 4, 2.0)(X))


def test_experts_that_choose_take_their_own_records_only():
    router = ExpertChoiceRouter(4, 4, 2.0)
    with pytest.raises(ValueError, match="in which experts choose, got one in which tokens do"):
        router(X, routing=TopKRouter(4, 4, 2)(X))
    record = router(X)
    assert torch.equal(router(X, routing=record).weight_TK, record.weight_TK)


def test_batchwise_takes_what_it_decided_in_either_mode():
    router = BatchwiseRouter(4, 4, 2)
    for training in (True, False):
        record = router.train(training)(X)
        assert (record.token_N is None) == (not training)
        for replaying in (True, False):
            again = router.train(replaying)(X, routing=record)
            assert torch.equal(again.expert_TK, record.expert_TK)
            assert torch.equal(again.weight_TK, record.weight_TK)


@pytest.mark.parametrize("name", ["top-k", "base", "sinkhorn", "hierarchical", "fixed"])
def test_a_choice_that_was_not_carried_out_stays_so(name):
    router = TOKENS_CHOOSE[name](4)
    record = router(X)
    expert_TK = record.expert_TK.clone()
    expert_TK[::2, 0] = 4
    dropped = dataclasses.replace(record, expert_TK=expert_TK)
    again = router(X, routing=dropped)
    assert torch.equal(again.expert_TK, expert_TK)
    assert (again.weight_TK[::2, 0] == 0).all()
    assert torch.equal(again.weight_TK[1::2], record.weight_TK[1::2])


class Nobody:
    """A population that may not be asked."""

    def arrange(self, num_tokens, sequence_length, key):
        raise AssertionError("arranged for nothing")


BY_PLACE = {
    "uniform": lambda: UniformRouter(4, 4, 2),
    "round robin": lambda: RoundRobinRouter(4, 4, 2),
    "fixed": lambda: FixedRouter(4, 4),
    "thor": lambda: ThorRouter(4, 4),
    "hash": lambda: HashRouter(4, 4, torch.arange(4), by="position"),
    "base": lambda: BaseRouter(4, 4),
    "sinkhorn": lambda: SinkhornRouter(4, 4, 2),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BY_PLACE)
def test_replay_neither_draws_nor_asks_other_ranks(name, training):
    router = BY_PLACE[name]().train(training)
    x = X[:4]
    record = router(x)
    router.population = Nobody()
    state = torch.get_rng_state()
    assert torch.equal(router(x, routing=record).expert_TK, record.expert_TK)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_best_expert_of_a_token_needs_no_other_ranks():
    router = BaseRouter(4, 4, seed=0).eval()
    router.population = Nobody()
    key = RandomKey.of(0, 1, torch.arange(8))
    assert torch.equal(router(X, key=key).expert_TK[:, 0], (X @ router.weight_ED.T).argmax(1))
