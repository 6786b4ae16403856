"""Output layer and cross entropy over some tokens at a time.

The logits of all tokens are the largest tensor of a step: at 256,384 words and sequences of 2048
they take 2 GiB a sequence in float32, several times over. Here those of one chunk of tokens live
at a time. The gradients of hidden states and weight need nothing but them, so they are made in the
forward pass, chunk by chunk, and the backward pass only scales them. Memory is that of one chunk,
of the gradients, and of nothing that grows with tokens times words.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.cross_entropy.reference import PLAIN, CrossEntropy
from expertmesh.kernels.first_order import first_order
from expertmesh.uncompiled import uncompiled

# Logits of a chunk: 2**28 are 1 GiB in float32, 1047 tokens at 256,384 words. With fewer tokens
# the weight's gradient, which every chunk reads and writes, costs as much time as the products.
LOGITS_AT_ONCE = 1 << 28


def linear_cross_entropy(
    hidden: Tensor,
    weight_VD: Tensor,
    targets: Tensor,
    kind: CrossEntropy = PLAIN,
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """``token_loss(F.linear(hidden, weight_VD), targets, kind)``, never holding all logits.

    Under autocast the matrix products are in its dtype; the rest, and the weight's gradient, is in
    float32 or wider. Tokens without a target cost nothing. Where gradients are off, none are
    made; else the backward pass may run once. ``torch.compile`` leaves the function as it is: it
    would keep what is freed here.

    Args:
        hidden: ``(..., D)``.
        weight_VD: ``(V, D)``, whole on this rank.
        targets: int64 ``(...)``.
        kind: What a token's loss is.
        logits_at_once: How many logits may live at a time; at least those of one token do.

    Returns:
        A scalar, float32 or wider; 0 where no token has a target.

    Raises:
        ValueError: If shapes differ.
    """
    if hidden.shape != (*targets.shape, weight_VD.shape[-1]):
        raise ValueError(
            f"expected hidden (..., D), weight (V, D) and targets (...), got "
            f"{tuple(hidden.shape)}, {tuple(weight_VD.shape)} and {tuple(targets.shape)}"
        )
    device = hidden.device.type
    dtype = torch.promote_types(hidden.dtype, weight_VD.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    rows = max(1, logits_at_once // weight_VD.shape[0])
    hidden_ND = hidden.reshape(targets.numel(), hidden.shape[-1])
    # Inside the function gradient mode is always off.
    grad = torch.is_grad_enabled()
    return _apply(hidden_ND, weight_VD, targets.flatten(), kind, dtype, rows, grad)


@uncompiled
def _apply(*arguments: Any) -> Tensor:
    loss: Tensor = _LinearCrossEntropy.apply(*arguments)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps the two gradients and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        kind: CrossEntropy,
        dtype: torch.dtype,
        rows: int,
        grad: bool,
    ) -> Tensor:
        for_hidden, for_weight = (grad and needed for needed in ctx.needs_input_grad[:2])
        kept_T = (targets_N != kind.ignore_index).nonzero().squeeze(1)
        wide = torch.promote_types(dtype, torch.float32)
        grad_ND = torch.zeros_like(hidden_ND) if for_hidden else None
        grad_VD = torch.zeros_like(weight_VD, dtype=wide) if for_weight else None
        loss_T = torch.empty(len(kept_T), dtype=wide, device=hidden_ND.device)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            cast_VD = weight_VD.to(dtype)
            # Not `split`: of no tokens it makes one chunk.
            for start in range(0, len(kept_T), rows):
                chunk_C = kept_T[start : start + rows]
                x_CD = hidden_ND[chunk_C].to(dtype)
                logits_CV = (x_CD @ cast_VD.T).to(wide)
                loss_C, z_C = _losses(logits_CV, targets_N[chunk_C], kind)
                loss_T[start : start + rows] = loss_C
                if not (for_hidden or for_weight):
                    continue
                _to_gradient(logits_CV, z_C, targets_N[chunk_C], kind)
                slope_CV = logits_CV.to(dtype)
                if grad_ND is not None:
                    grad_ND[chunk_C] = (slope_CV @ cast_VD).to(grad_ND.dtype)
                if grad_VD is not None:
                    _add_product(grad_VD, slope_CV.T, x_CD)
        ctx.save_for_backward(grad_ND, None if grad_VD is None else grad_VD.to(weight_VD.dtype))
        return loss_T.sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the weight's gradient is as large as the weight. A second backward pass is
        # refused by torch, which sees that what was saved has changed. A tensor of one dimension is
        # not rounded to the dtype of what it multiplies, by which all layers below would be scaled.
        grad_1 = grad.view(1)
        gradients = [None if saved is None else saved.mul_(grad_1) for saved in ctx.saved_tensors]
        return *gradients, None, None, None, None, None


def _losses(logits_CV: Tensor, targets_C: Tensor, kind: CrossEntropy) -> tuple[Tensor, Tensor]:
    """Losses ``(C,)``, and Z over exp of the largest logit with log Z beside it, ``(2, C)``.

    Leaves ``exp(l - max l)`` in the place of the logits.
    """
    largest_C = logits_CV.amax(1)
    logits_CV.sub_(largest_C.unsqueeze(1))
    target_C = logits_CV.gather(1, targets_C.unsqueeze(1)).squeeze(1)
    mean_C = logits_CV.mean(1) if kind.label_smoothing else torch.zeros_like(target_C)
    sum_C = logits_CV.exp_().sum(1)
    # Relative to the largest logit, so that large ones do not swallow small differences.
    log_C = sum_C.log()
    log_z_C = largest_C + log_C
    smoothing = kind.label_smoothing
    loss_C = log_C - (1 - smoothing) * target_C - smoothing * mean_C
    return loss_C + kind.z_loss * log_z_C.square(), torch.stack([sum_C, log_z_C])


def _to_gradient(exp_CV: Tensor, z_2C: Tensor, targets_C: Tensor, kind: CrossEntropy) -> None:
    """Turn ``exp(l - max l)`` into the loss's gradient by the logits, in place."""
    sum_C, log_z_C = z_2C
    exp_CV.mul_(((1 + 2 * kind.z_loss * log_z_C) / sum_C).unsqueeze(1))
    if kind.label_smoothing:
        exp_CV.sub_(kind.label_smoothing / exp_CV.shape[1])
    hit_C1 = exp_CV.new_full((len(exp_CV), 1), kind.label_smoothing - 1)
    exp_CV.scatter_add_(1, targets_C.unsqueeze(1), hit_C1)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    """``sum += left @ right``, summed in the wide dtype where the device's product can."""
    if sum_VD.dtype == left_VC.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    elif sum_VD.is_cuda:
        torch.addmm(sum_VD, left_VC, right_CD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD.add_(left_VC @ right_CD)
