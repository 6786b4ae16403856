import torch

from expertmesh.dispatch import LocalDispatcher
from expertmesh.routing import TopKRouter


def test_on_one_rank_both_ways_are_the_identity():
    x = torch.randn(5, 4)
    routing = TopKRouter(4, 3, 2)(x)
    dispatcher = LocalDispatcher()
    sent = dispatcher.dispatch(x, routing)
    assert sent.x_RD is x
    assert sent.expert_RK is routing.expert_TK
    assert sent.weight_RK is routing.weight_TK
    assert dispatcher.combine(x, sent.context) is x
