"""Gradients that have none of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import UserError

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Of an autograd function's ``backward``: differentiating what it returns is an error.

    ``once_differentiable`` of torch is not enough: it lets a gradient pass as a constant wherever
    the one that came in does not depend on anything, as that of a sum, though a gradient also
    depends on what forward saved.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # nobody asked with create_graph=True
            return gradients
        return _Last.apply(torch.empty(0, requires_grad=True), *gradients)

    return once


class _Last(torch.autograd.Function):
    """Gradients as they are, in a graph that ends here."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise UserError(
            "a kernel's gradient was differentiated again, which it does not allow; for second "
            "derivatives set backend='reference' of the experts, route on a CPU, and take "
            "torch.nn.functional.cross_entropy: their gradients are autograd's"
        )
