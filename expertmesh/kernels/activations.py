"""Activations by name, and the step from pre-activation to hidden units with its gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.errors import UserError, nearest

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, 2016, section 2)."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (Primer, arXiv 2109.08668)."""
    return torch.nn.functional.relu(x).square()


ACTIVATIONS: dict[str, Activation] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.nn.functional.relu,
    "relu2": relu2,
    "silu": torch.nn.functional.silu,
}


@dataclass(frozen=True)
class GatedActivation:
    """An activation of gated experts that changes the linear half too: ``gate(a) * linear(b)``.

    Attributes:
        name: For printing.
        gate: Elementwise function of the gate's half.
        linear: Elementwise function of the other half.
    """

    name: str
    gate: Activation
    linear: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """The gate's half."""
        return self.gate(x)


def _clamped_swish(x: Tensor) -> Tensor:
    bounded = x.clamp(max=7.0)
    return bounded * torch.sigmoid(1.702 * bounded)


def _clamped_plus_one(x: Tensor) -> Tensor:
    return x.clamp(-7.0, 7.0) + 1.0


GATED_ACTIVATIONS: dict[str, GatedActivation] = {
    "clamped_swiglu": GatedActivation("clamped_swiglu", _clamped_swish, _clamped_plus_one),
}
"""``clamped_swiglu`` is gpt-oss's: ``g sigmoid(1.702 g) (u + 1)``, g at most 7, u in [-7, 7]."""


def resolve_activation(activation: str | Activation) -> Activation:
    """The callable behind a name; a callable is returned as it is.

    Raises:
        ValueError: If the name is not in the table, or a module with parameters is given: the
            experts' gradient does not reach them.
    """
    if not isinstance(activation, str):
        if isinstance(activation, torch.nn.Module) and any(True for _ in activation.parameters()):
            raise ValueError(
                f"activation must have no parameters, got {type(activation).__name__}; "
                "put the whole expert in ModuleExperts instead"
            )
        return activation
    names: dict[str, Activation] = {**ACTIVATIONS, **GATED_ACTIVATIONS}
    if activation not in names:
        raise ValueError(
            f"activation must be one of {', '.join(sorted(names))} or a callable from "
            f"tensor to tensor, got {activation!r}{nearest(activation, names)}"
        )
    return names[activation]


def check_parts(activation: Activation, num_parts: int) -> None:
    """Refuse an activation of gated experts where there is no linear half.

    Raises:
        ValueError: With its name.
    """
    if isinstance(activation, GatedActivation) and num_parts != 2:
        raise UserError(
            f"activation {activation.name!r} is for gated experts, whose up has 2 parts; "
            f"this one has {num_parts}"
        )


def known_activation(activation: Activation) -> str | None:
    """The name of an activation of the table; None for any other callable."""
    return next((name for name, f in ACTIVATIONS.items() if f is activation), None)


def activation_name(activation: Activation) -> str:
    """The name of an activation, for printing."""
    if isinstance(activation, GatedActivation):
        return activation.name
    known = known_activation(activation)
    return str(getattr(activation, "__name__", repr(activation))) if known is None else known


def hidden_units(activation: Activation, pre: Tensor, num_parts: int) -> Tensor:
    """From pre-activations to what the down projection reads.

    Args:
        activation: Elementwise function.
        pre: ``(..., P F)``, the parts one after the other.
        num_parts: P; see ``hidden_from_parts``.

    Returns:
        ``(..., F)``.
    """
    return hidden_from_parts(activation, pre.chunk(num_parts, dim=-1))


_GATE = {1: 0, 2: 0, 3: 1}  # which part is activated, by the number of parts


def hidden_from_parts(activation: Activation, parts: Sequence[Tensor]) -> Tensor:
    """The product of an activated part and of those that are not.

    Args:
        activation: Elementwise function.
        parts: One, ``act(a)``; two, ``act(g) * u``, the gate first; or three, the doubly gated
            ``a * act(g) * u`` of OpenMoE.

    Returns:
        A part's shape.
    """
    gate = _GATE[len(parts)]
    hidden = activation(parts[gate])
    for index, part in enumerate(parts):
        if index != gate:
            hidden = hidden * _linear(activation)(part)
    return hidden


class HiddenGradient(NamedTuple):
    """The hidden units once more, and the rule that takes their gradient to ``pre``'s."""

    hidden: Tensor
    backward: Callable[[Tensor], Tensor]


def hidden_units_vjp(activation: Activation, pre: Tensor, num_parts: int) -> HiddenGradient:
    """Recompute the hidden units and keep what their gradient needs.

    Args:
        activation: Elementwise function.
        pre: As in ``hidden_units``.
        num_parts: As in ``hidden_units``.

    Returns:
        ``hidden`` ``(..., F)``, and ``backward``: ``(..., F)`` to the shape of ``pre``; it is
        called at most once.
    """
    return hidden_from_parts_vjp(activation, pre.chunk(num_parts, dim=-1))


def hidden_from_parts_vjp(activation: Activation, parts: Sequence[Tensor]) -> HiddenGradient:
    """``hidden_units_vjp`` over parts; the gradient comes back as one tensor, in their order."""
    gate = _GATE[len(parts)]
    hidden, pullback = _vjp(activation, parts[gate])
    steps: list[tuple[int, Tensor, Tensor, Callable[[Tensor], Tensor]]] = []
    for index, part in enumerate(parts):
        if index != gate:
            factor, factor_pullback = _linear_vjp(activation, part)
            steps.append((index, hidden, factor, factor_pullback))
            hidden = hidden * factor

    def backward(grad: Tensor) -> Tensor:
        grads = [grad] * len(parts)
        for index, before, factor, factor_pullback in reversed(steps):
            grads[index] = factor_pullback(grad * before)
            grad = grad * factor
        grads[gate] = pullback(grad)
        return torch.cat(grads, dim=-1) if steps else grads[gate]

    return HiddenGradient(hidden, backward)


def _linear_vjp(activation: Activation, part: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    linear = _linear(activation)
    return (part, _same) if linear is _same else _vjp(linear, part)


def _linear(activation: Activation) -> Activation:
    return activation.linear if isinstance(activation, GatedActivation) else _same


def _same(x: Tensor) -> Tensor:
    return x


def _vjp(activation: Activation, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    if torch.compiler.is_compiling():  # autograd.grad does not trace inside a backward
        pulled = torch.func.vjp(activation, x)
        return pulled[0], lambda grad: pulled[1](grad)[0]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        traced = activation(leaf)
    return traced.detach(), lambda grad: torch.autograd.grad(traced, leaf, grad)[0]
