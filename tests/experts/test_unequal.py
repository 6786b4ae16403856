"""Experts of unequal width."""

import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts import GatedMLPExperts, HeterogeneousExperts, MLPExperts
from expertmesh.experts.unequal import UnequalExperts, UnequalGatedMLPExperts, UnequalMLPExperts
from expertmesh.layer import MoE
from expertmesh.routing import TopKRouter
from expertmesh.testing import assert_close

WIDTHS = (3, 9, 5)
PAIRS = [(UnequalMLPExperts, MLPExperts), (UnequalGatedMLPExperts, GatedMLPExperts)]


def routed(num_rows: int = 11, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, dim, generator=g, dtype=torch.float64)
    expert = torch.randint(0, 4, (num_rows, 2), generator=g)
    return x, expert, torch.rand(num_rows, 2, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("unequal", "stacked"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_with_one_width_they_are_stacked_experts(
    unequal: type[UnequalExperts], stacked: type[nn.Module], bias: bool
) -> None:
    """The same seed, values and outputs."""
    ours = unequal(4, [6] * 3, bias=bias, seed=5, dtype=torch.float64)
    theirs = stacked(4, 6, 3, bias=bias, seed=5, dtype=torch.float64)
    assert_close("y", ours(*routed()), theirs(*routed()))


def test_they_are_the_weighted_sum_of_their_modules() -> None:
    ours = UnequalMLPExperts(4, WIDTHS, bias=True, seed=1, dtype=torch.float64)
    with torch.no_grad():
        ours.up_bias.normal_()
        ours.down_bias.normal_()
    modules = []
    for e, width in enumerate(WIDTHS):
        units = slice(sum(WIDTHS[:e]), sum(WIDTHS[: e + 1]))
        first, second = nn.Linear(4, width).double(), nn.Linear(width, 4).double()
        first.weight.data, first.bias.data = ours.up[0, units], ours.up_bias[0, units]
        second.weight.data, second.bias.data = ours.down[units].T, ours.down_bias[e]
        modules.append(nn.Sequential(first, nn.ReLU(), second))
    assert_close("y", ours(*routed()), HeterogeneousExperts(modules, dim=4)(*routed()))


def test_products_agree_with_the_definition() -> None:
    x, expert, weight = routed()
    grads = []
    for backend in ("block_sparse", "reference"):
        experts = UnequalGatedMLPExperts(4, WIDTHS, bias=True, seed=1, backend=backend)
        experts(x.float(), expert, weight.float()).square().sum().backward()
        grads.append({name: p.grad for name, p in experts.named_parameters()})
    for name, expected in grads[1].items():
        assert_close(name, grads[0][name], expected)


def test_expert_draws_do_not_depend_on_the_others() -> None:
    few = UnequalGatedMLPExperts(4, WIDTHS[:2], seed=3)
    many = UnequalGatedMLPExperts(4, WIDTHS, seed=3)
    assert torch.equal(few.gate_up, many.gate_up[:, :12])
    assert torch.equal(few.down, many.down[:12])


def test_in_a_layer() -> None:
    layer = MoE(TopKRouter(4, 3, 2), UnequalGatedMLPExperts(4, WIDTHS))
    y = layer(torch.randn(2, 5, 4))
    y.sum().backward()
    assert y.shape == (2, 5, 4)
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.slow
def test_a_compiled_layer_leaves_them_out() -> None:
    layer = MoE(TopKRouter(4, 3, 2), UnequalGatedMLPExperts(4, WIDTHS)).eval()
    x = torch.randn(2, 5, 4)
    expected = layer(x)
    layer.experts.forward = torch.compiler.disable(layer.experts.forward)
    assert_close("y", torch.compile(layer, backend="eager")(x), expected)


def test_meta_is_drawn_later() -> None:
    experts = UnequalMLPExperts(4, WIDTHS, device="meta").to_empty(device="cpu")
    experts.reset_parameters(2)
    expected = UnequalMLPExperts(4, WIDTHS, seed=2)
    for name, value in expected.named_parameters():
        assert torch.equal(experts.get_parameter(name), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": []}, "num_experts must be at least 1, got 0"),
        ({"widths": [3, 0]}, r"widths must be at least 1 each, got \(3, 0\)"),
        ({"activation": "clamped_swiglu"}, "'clamped_swiglu' is for gated experts.*one has 1"),
        ({"backend": "grouped_mm"}, "backend must be one of auto, block_sparse, reference, got"),
        ({"init_std": -1.0}, "init_std must be a number >= 0 or None, got -1.0"),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnequalMLPExperts(**{"dim": 4, "widths": WIDTHS, **change})


def test_printing_says_the_widths() -> None:
    assert "widths=(3, 9, 5), activation=silu" in repr(UnequalGatedMLPExperts(4, WIDTHS))
