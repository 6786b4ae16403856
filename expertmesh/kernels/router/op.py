"""The router's operations as the rest of the library calls them.

Each is an operation of torch, so that ``torch.compile`` leaves it whole. Gradients are autograd
functions over them: an operation with a registered gradient costs the host three times the time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertmesh.kernels.router import library  # noqa: F401  defines the operations


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x W^T`` to the accuracy of float32; ``(T, E)`` float32, differentiable.

    Args:
        x_TD: bfloat16.
        weight_ED: float32 or bfloat16.
    """
    logits_TE: Tensor = _Logits.apply(x_TD, weight_ED)
    return logits_TE


def router_choose(logits_TE: Tensor, k: int, sigmoid: bool) -> Tensor:
    """The k experts of highest score; see ``reference_choose``."""
    chosen_TK: Tensor = torch.ops.expertmesh.router_choose(logits_TE.detach(), k, sigmoid)
    return chosen_TK


def router_select(
    logits_TE: Tensor, k: int, *, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``router_choose`` and ``router_gates`` in one launch, without gradient.

    Returns:
        ``chosen_TK``, ``score_TE``, ``gate_TK`` and ``load_E``.
    """
    results: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.expertmesh.router_select(
        logits_TE.detach(), k, sigmoid, renormalize, scale
    )
    return results


def router_gates(
    logits_TE: Tensor, chosen_TK: Tensor, *, sigmoid: bool, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, gates and load, the first two differentiable; see ``reference_gates``."""
    results: tuple[Tensor, Tensor, Tensor] = _Gates.apply(
        logits_TE, chosen_TK, sigmoid, renormalize, scale
    )
    return results


def router_count(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    dropped_TK: Tensor,
    load_E: Tensor,
    counters: list[Tensor],
    length: int,
) -> None:
    """Add one pass to a layer's counters, in one or two launches.

    Args:
        logits_TE: Router logits.
        chosen_TK: int64, E where nothing was chosen.
        dropped_TK: bool.
        load_E: int64.
        counters: Changed in place. int64: load ``(E,)``, choices and dropped by position
            ``(16,)``, tokens ``()``; float32: entropy and largest absolute logit, ``()``.
        length: Tokens in a sequence.
    """
    torch.ops.expertmesh.router_count(logits_TE, chosen_TK, dropped_TK, load_E, counters, length)


def router_balance(score_TE: Tensor, chosen_TK: Tensor, size: int) -> Tensor:
    """``sum_e f_e P_e`` of each ``size`` consecutive tokens: choices of e times mean probability.

    Args:
        score_TE: float32; divided by their sum they are probabilities.
        chosen_TK: int64, E where nothing was chosen; f carries no gradient.
        size: Tokens of a group; divides T.

    Returns:
        ``(T / size,)``, differentiable.
    """
    product_G: Tensor = _Balance.apply(score_TE, chosen_TK, size)
    return product_G


def router_z(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, a scalar, differentiable.

    Args:
        logits_TE: float32, T above 0.
    """
    mean: Tensor = _Z.apply(logits_TE)
    return mean


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        logits_TE: Tensor = torch.ops.expertmesh.router_logits(x_TD, weight_ED)
        return logits_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad)
        backward = torch.ops.expertmesh.router_logits_backward
        gradients = backward(dlogits_TE, *ctx.saved_tensors, wanted)
        return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        chosen_TK: Tensor,
        sigmoid: bool,
        renormalize: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.rule = (sigmoid, renormalize, scale)
        results: tuple[Tensor, Tensor, Tensor] = torch.ops.expertmesh.router_gates(
            logits_TE, chosen_TK, *ctx.rule
        )
        ctx.save_for_backward(results[0], chosen_TK)
        ctx.mark_non_differentiable(results[2])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dscore_TE: Tensor | None, dgate_TK: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        if dscore_TE is None and dgate_TK is None:
            return (None,) * 5
        backward = torch.ops.expertmesh.router_gates_backward
        return backward(*ctx.saved_tensors, dscore_TE, dgate_TK, *ctx.rule), None, None, None, None


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, chosen_TK: Tensor, size: int) -> Tensor:
        ctx.size = size
        product_G: Tensor
        product_G, fraction_GE = torch.ops.expertmesh.router_balance(score_TE, chosen_TK, size)
        ctx.save_for_backward(score_TE, fraction_GE)
        return product_G

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dproduct_G: Tensor) -> tuple[Tensor | None, ...]:
        backward = torch.ops.expertmesh.router_balance_backward
        return backward(*ctx.saved_tensors, dproduct_G, ctx.size), None, None


class _Z(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        mean: Tensor
        mean, norm_T = torch.ops.expertmesh.router_z(logits_TE)
        ctx.save_for_backward(logits_TE, norm_T)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmean: Tensor) -> Tensor:
        dlogits_TE: Tensor = torch.ops.expertmesh.router_z_backward(*ctx.saved_tensors, dmean)
        return dlogits_TE
