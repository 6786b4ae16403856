"""The router's operations as the rest of the library calls them.

Each is an operation of torch, so that ``torch.compile`` leaves it whole. Gradients are autograd
functions over them: an operation with a registered gradient costs the host three times the time.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.first_order import first_order
from expertmesh.kernels.router import library  # noqa: F401  defines the operations


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x W^T`` to the accuracy of float32; ``(T, E)`` float32, differentiable.

    Args:
        x_TD: bfloat16.
        weight_ED: float32 or bfloat16.
    """
    needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_ED.requires_grad)
    logits = _Logits.apply if needs_grad else torch.ops.expertmesh.router_logits
    logits_TE: Tensor = logits(x_TD, weight_ED)
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
    logits_TE: Tensor,
    chosen_TK: Tensor,
    *,
    sigmoid: bool,
    renormalize: bool,
    scale: float,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, gates, load and norms, all but the load differentiable; see ``reference_gates``.

    Args:
        logits_TE: Router logits.
        chosen_TK: int64, E where nothing was chosen.
        sigmoid: Whether scores are sigmoids; softmax otherwise.
        renormalize: Whether each row's weights are divided by their sum.
        scale: Multiplies the weights.
        factors: x and weight where the logits are ``router_logits(x, weight)``. These two are held
            until backward in any case: the logits are then computed again and not held.

    Returns:
        ``score_TE``, ``gate_TK``, ``load_E``, and ``norm_T``, each token's logsumexp of logits.
    """
    results: tuple[Tensor, Tensor, Tensor, Tensor] = _Gates.apply(
        logits_TE, chosen_TK, sigmoid, renormalize, scale, *(factors or ())
    )
    return results


def router_count(
    logits_TE: Tensor,
    chosen_TK: Tensor,
    dropped_TK: Tensor | None,
    load_E: Tensor,
    counters: list[Tensor],
    length: int,
) -> None:
    """Add one pass to a layer's counters, in one or two launches.

    Args:
        logits_TE: Router logits.
        chosen_TK: int64, E where nothing was chosen.
        dropped_TK: bool; None where nothing was dropped.
        load_E: int64.
        counters: Changed in place. int64: load ``(E,)``, choices and dropped by position
            ``(16,)``, tokens ``()``; float32: entropy and largest absolute logit, ``()``.
        length: Tokens in a sequence.
    """
    torch.ops.expertmesh.router_count(logits_TE, chosen_TK, dropped_TK, load_E, counters, length)


def router_balance(
    score_TE: Tensor, chosen_TK: Tensor, size: int, *, softmax: bool = False
) -> Tensor:
    """``sum_e f_e P_e`` of each ``size`` consecutive tokens: choices of e times mean probability.

    Args:
        score_TE: float32; divided by their sum they are probabilities.
        chosen_TK: int64, E where nothing was chosen; f carries no gradient.
        size: Tokens of a group; divides T.
        softmax: Whether the scores come out of a softmax. Then they sum to 1, and their gradient
            is given up to a constant in each row, of which a softmax passes nothing on: it is f,
            for all tokens of a group the same, and no score is held until backward.

    Returns:
        ``(T / size,)``, differentiable.
    """
    product_G: Tensor = _Balance.apply(score_TE, chosen_TK, size, softmax)
    return product_G


def router_sums(score_TE: Tensor, chosen_TK: Tensor, *, softmax: bool = False) -> Tensor:
    """What ``router_balance`` is made of, of all tokens here: to be added up over ranks.

    Args:
        score_TE: float32, T above 0; divided by their sum they are probabilities.
        chosen_TK: int64, E where nothing was chosen.
        softmax: As of ``router_balance``.

    Returns:
        ``(2 E + 1,)`` float32: choices of each expert, its summed probability, and T; numbers up
        to 2^24 are exact. The probability alone is differentiable.
    """
    sum_X: Tensor = _Sums.apply(score_TE, chosen_TK, softmax)
    return sum_X


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
    @first_order
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
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.rule = (sigmoid, renormalize, scale)
        score_TE, gate_TK, load_E, norm_T, narrow_TK = torch.ops.expertmesh.router_gates(
            logits_TE, chosen_TK, *ctx.rule
        )
        ctx.save_for_backward(narrow_TK, *(factors or (logits_TE,)))
        ctx.mark_non_differentiable(load_E)
        ctx.set_materialize_grads(False)
        return score_TE, gate_TK, load_E, norm_T

    @staticmethod
    @first_order
    def backward(
        ctx: Any,
        dscore_TE: Tensor | None,
        dgate_TK: Tensor | None,
        _: None,
        dnorm_T: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        if dscore_TE is None and dgate_TK is None and dnorm_T is None:
            return None, *nothing
        ops = torch.ops.expertmesh
        narrow_TK, *source = ctx.saved_tensors
        held = len(source) == 1
        parts_TPE = source[0].unsqueeze(1) if held else ops.router_logits_again(*source)
        given = (parts_TPE, narrow_TK, dscore_TE, dgate_TK, dnorm_T)
        return ops.router_gates_backward(*given, *ctx.rule), *nothing


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, chosen_TK: Tensor, size: int, softmax: bool) -> Tensor:
        ctx.size = size
        product_G: Tensor
        product_G, fraction_GE = torch.ops.expertmesh.router_balance(score_TE, chosen_TK, size)
        ctx.save_for_backward(fraction_GE, *(() if softmax else (score_TE,)))
        return product_G

    @staticmethod
    @first_order
    def backward(ctx: Any, dproduct_G: Tensor) -> tuple[Tensor | None, ...]:
        fraction_GE, *scores = ctx.saved_tensors
        nothing = (None,) * 3
        if not scores:
            slope_GE = fraction_GE * (dproduct_G / ctx.size)[:, None]
            # The rows of a single group stay one row in memory.
            return slope_GE[:, None].expand(-1, ctx.size, -1).flatten(0, 1), *nothing
        backward = torch.ops.expertmesh.router_balance_backward
        return backward(scores[0], fraction_GE, dproduct_G, ctx.size), *nothing


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_TE: Tensor, chosen_TK: Tensor, softmax: bool) -> Tensor:
        ctx.shape = score_TE.shape
        ctx.save_for_backward(*(() if softmax else (score_TE,)))
        sum_X: Tensor = torch.ops.expertmesh.router_sums(score_TE, chosen_TK)
        return sum_X

    @staticmethod
    @first_order
    def backward(ctx: Any, dsum_X: Tensor) -> tuple[Tensor | None, ...]:
        T, E = ctx.shape
        slope_1E = dsum_X[None, E : 2 * E]
        if not ctx.saved_tensors:
            return slope_1E.expand(T, E), None, None
        backward = torch.ops.expertmesh.router_balance_backward
        return backward(*ctx.saved_tensors, slope_1E, slope_1E.new_full((1,), T), T), None, None


class _Z(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor) -> Tensor:
        mean: Tensor
        mean, norm_T = torch.ops.expertmesh.router_z(logits_TE)
        ctx.save_for_backward(logits_TE, norm_T)
        return mean

    @staticmethod
    @first_order
    def backward(ctx: Any, dmean: Tensor) -> tuple[Tensor]:
        return (torch.ops.expertmesh.router_z_backward(*ctx.saved_tensors, dmean),)
