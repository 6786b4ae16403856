import pytest
import torch

from expertmesh.routing import (
    BaseRouter,
    BatchwiseRouter,
    CosineRouter,
    ExpertChoiceRouter,
    FixedRouter,
    HierarchicalRouter,
    SinkhornRouter,
    TopKRouter,
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
