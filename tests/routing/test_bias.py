import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from expertmesh.routing import SelectionBias, TopKRouter, update_selection_bias


def test_update_moves_against_the_load_by_exact_counts():
    bias = SelectionBias(4, rate=0.01)
    bias.count(torch.tensor([[0, 1], [0, 1], [0, 2], [4, 4]]))
    assert bias.count_E.tolist() == [3, 2, 1, 0]
    bias.update()
    assert bias.bias_E.tolist() == pytest.approx([-0.01, -0.01, 0.01, 0.01])
    assert bias.count_E.tolist() == [0, 0, 0, 0]


def test_counts_beyond_float32_are_still_exact():
    bias = SelectionBias(2, rate=1.0)
    bias.count_E.copy_(torch.tensor([(1 << 40) + 1, (1 << 40) - 1]))
    bias.update()
    assert bias.bias_E.tolist() == [-1.0, 1.0]


def test_counts_of_all_layers_are_reduced_together():
    layers = nn.ModuleList([SelectionBias(2, rate=1.0), SelectionBias(3, rate=1.0)])
    layers[0].count(torch.tensor([[0]]))
    layers[1].count(torch.tensor([[2]]))
    other_ranks = torch.tensor([0, 5, 4, 4, 0])
    update_selection_bias(layers, reduce=lambda counts: counts + other_ranks)
    assert layers[0].bias_E.tolist() == [1.0, -1.0]
    assert layers[1].bias_E.tolist() == [-1.0, -1.0, 1.0]
    assert layers[0].count_E.tolist() == [0, 0]


def test_evaluation_and_recompute_are_not_counted():
    router = TopKRouter(8, 4, 2, bias=SelectionBias(4), seed=0)
    x = torch.randn(10, 8, requires_grad=True)
    for reentrant in (False, True):
        router.bias.count_E.zero_()
        y = checkpoint(lambda x: router(x).weight_TK, x, use_reentrant=reentrant)
        y.sum().backward()
        assert router.bias.count_E.sum() == 20
    router.eval()(x)
    assert router.bias.count_E.sum() == 20


def test_balances_a_skewed_router():
    torch.manual_seed(0)
    shift = torch.ones(8)
    bias = SelectionBias(4, rate=0.005)
    router = TopKRouter(8, 4, 1, score="sigmoid", bias=bias, seed=0, init_std=0.5)
    with torch.no_grad():
        router.weight_ED[0] += 0.5
    assert router(torch.randn(4096, 8) + shift).load_E.max() > 2 * 1024
    router.bias.reset_parameters()
    for _ in range(200):
        router(torch.randn(256, 8) + shift)
        update_selection_bias(router)
    load = router(torch.randn(4096, 8) + shift).load_E
    assert load.max() < 1.3 * 1024


def test_half_precision_models_keep_the_bias_exact():
    router = TopKRouter(8, 4, 2, bias=SelectionBias(4), seed=0)
    router.bias.bias_E.fill_(0.1234567)
    router.to(torch.bfloat16)
    assert router.weight_ED.dtype == torch.bfloat16
    assert router.bias.bias_E.dtype == torch.float32
    assert torch.equal(router.bias.bias_E, torch.full((4,), 0.1234567))


def test_bias_and_counts_are_in_the_checkpoint():
    router = TopKRouter(8, 4, 2, bias=SelectionBias(4), seed=0)
    assert {"bias.bias_E", "bias.count_E"} <= router.state_dict().keys()


def test_negative_rate():
    with pytest.raises(ValueError, match="rate must be at least 0, got -1"):
        SelectionBias(4, rate=-1)
