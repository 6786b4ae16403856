"""Hidden units and their gradient against autograd."""

import pytest
import torch

from expertmesh.kernels.activations import (
    ACTIVATIONS,
    activation_name,
    hidden_units,
    hidden_units_vjp,
    resolve_activation,
)
from expertmesh.testing import assert_close


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gradient(name: str, gated: bool) -> None:
    activation = resolve_activation(name)
    pre = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    hidden = hidden_units(activation, pre, gated)
    grad = torch.randn_like(hidden)
    (expected,) = torch.autograd.grad(hidden, pre, grad)
    again = hidden_units_vjp(activation, pre.detach(), gated)
    assert_close("hidden", again.hidden, hidden)
    assert_close("gradient", again.backward(grad), expected)
    assert not again.hidden.requires_grad


def test_names() -> None:
    assert activation_name(resolve_activation("gelu_tanh")) == "gelu_tanh"
    assert activation_name(torch.sin) == "sin"
