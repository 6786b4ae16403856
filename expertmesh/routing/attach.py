"""Balance losses that train without anyone adding them up."""

from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    """Passes the output on and gives the loss its gradient in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor | None) -> Tensor:
        ctx.like = {"dtype": loss.dtype, "device": loss.device}
        ctx.scale = scale
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ctx.scale
        if scale is None:
            slope = torch.ones((), **ctx.like)
        elif scale.device.type == "cpu" and not torch.compiler.is_compiling():
            slope = torch.full((), scale.item(), **ctx.like)  # one launch, no copy to wait for
        else:
            slope = (torch.ones((), **ctx.like) * scale).to(ctx.like["dtype"])
        return grad_outputs[0], slope, None


def attach_loss(y: Tensor, loss: Tensor, scale: Tensor | None = None) -> Tensor:
    """Tie a loss to an activation: whenever gradient flows into ``y``, the loss gets its own.

    The loss then trains under any loop, pipeline stage or wrapper, and no value is added to the
    main loss. Its gradient does not pass through the main loss, so whatever that one is multiplied
    by (loss scale, share of the step's tokens) must be given as ``scale``.

    Args:
        y: Any tensor on the way to the main loss.
        loss: A scalar.
        scale: A scalar, the loss's gradient; None for 1.

    Returns:
        ``y``, unchanged.
    """
    attached: Tensor = _Attach.apply(y, loss, scale)
    return attached
