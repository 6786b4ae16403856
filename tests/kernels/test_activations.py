"""Hidden units and their gradient against autograd."""

import math

import pytest
import torch

from expertmesh.experts import GatedMLPExperts
from expertmesh.kernels.activations import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    activation_name,
    hidden_units,
    hidden_units_vjp,
    known_activation,
    resolve_activation,
)
from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.testing import assert_close


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gradient(name: str, num_parts: int) -> None:
    activation = resolve_activation(name)
    pre = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    hidden = hidden_units(activation, pre, num_parts)
    grad = torch.randn_like(hidden)
    (expected,) = torch.autograd.grad(hidden, pre, grad)
    again = hidden_units_vjp(activation, pre.detach(), num_parts)
    assert_close("hidden", again.hidden, hidden)
    assert_close("gradient", again.backward(grad), expected)
    assert not again.hidden.requires_grad


@pytest.mark.parametrize("name", sorted(GATED_ACTIVATIONS))
def test_gradient_of_both_halves(name: str) -> None:
    activation = resolve_activation(name)
    pre = (6 * torch.randn(9, 6, dtype=torch.float64)).requires_grad_()  # beyond clamps too
    hidden = hidden_units(activation, pre, 2)
    grad = torch.randn_like(hidden)
    (expected,) = torch.autograd.grad(hidden, pre, grad)
    again = hidden_units_vjp(activation, pre.detach(), 2)
    assert_close("hidden", again.hidden, hidden)
    assert_close("gradient", again.backward(grad), expected)
    assert activation_name(activation) == name
    assert known_activation(activation) is None  # kernels that go by name must refuse it


def test_clamped_swiglu_by_its_formula() -> None:
    pre = torch.tensor([[1.0, 9.0, -9.0, 0.5, 9.0, -9.0]])
    hidden = hidden_units(resolve_activation("clamped_swiglu"), pre, 2)[0]
    for out, g, u in zip(hidden.tolist(), (1.0, 7.0, -9.0), (0.5, 7.0, -7.0), strict=True):
        assert out == pytest.approx(g / (1 + math.exp(-1.702 * g)) * (u + 1), rel=1e-5)


def test_doubly_gated_by_its_formula() -> None:
    a, g, u = torch.randn(3, 4, dtype=torch.float64)
    hidden = hidden_units(resolve_activation("silu"), torch.cat([a, g, u]), 3)
    assert_close("hidden", hidden, a * g * torch.sigmoid(g) * u)


def test_gated_activations_need_gated_experts() -> None:
    ids, weight = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    up, down = torch.ones(2, 4, 4), torch.ones(2, 4, 4)
    with pytest.raises(ValueError, match="'clamped_swiglu' is for gated experts"):
        moe_mlp(torch.ones(1, 4), ids, weight, up, down, activation="clamped_swiglu")


def test_names() -> None:
    assert activation_name(resolve_activation("gelu_tanh")) == "gelu_tanh"
    assert activation_name(torch.sin) == "sin"


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("decode", "it knows plain activations by name, neither clamped_swiglu nor callables"),
        ("triton", "its activations are gelu, gelu_tanh, relu, relu2, silu"),
    ],
)
def test_clamped_swiglu_is_refused_by_name_where_it_is_not_fused(backend: str, reason: str) -> None:
    """And the others run it, so ``auto`` has what to fall to."""
    options = {"activation": "clamped_swiglu", "bias": True, "seed": 0}
    x, ids = torch.randn(6, 8), torch.randint(3, (6, 2))
    weight, outputs = torch.rand(6, 2), {}
    with torch.no_grad():
        for name in ("auto", "gather", "grouped_mm", "loop", "reference"):
            outputs[name] = GatedMLPExperts(8, 8, 3, **options, backend=name)(x, ids, weight)
            torch.testing.assert_close(outputs[name], outputs["auto"])
        with pytest.raises(ValueError, match=f"'{backend}' cannot run this: {reason}"):
            GatedMLPExperts(8, 8, 3, **options, backend=backend)(x, ids, weight)
