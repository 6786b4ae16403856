"""Balance losses that train without anyone adding them up."""

from typing import Any

import torch
from torch import Tensor


class _Attach(torch.autograd.Function):
    """Passes the output on and gives the loss a gradient of one in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        ctx.loss_device = loss.device
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device)
        return grad_outputs[0], one


def attach_loss(y: Tensor, loss: Tensor) -> Tensor:
    """Tie a loss to an activation: whenever gradient flows into ``y``, the loss gets its own.

    The loss then trains under any loop, pipeline stage or wrapper, and no value is added to the
    main loss. Its gradient does not pass through the main loss, so whatever that one is multiplied
    by (loss scale, share of the step's tokens) must be multiplied into ``loss`` too.

    Args:
        y: Any tensor on the way to the main loss.
        loss: A scalar.

    Returns:
        ``y``, unchanged.
    """
    attached: Tensor = _Attach.apply(y, loss)
    return attached
