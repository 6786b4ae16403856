"""The operation through which every routing decision passes.

Activation checkpointing runs a forward pass again in backward. A router that decided anew could
decide otherwise (a changed weight, a nondeterministic kernel), and the gradients would belong to
experts that never ran. An operation of its own name lets a checkpointing policy keep its output,
a few integers per token, while everything else is recomputed.
"""

import torch
from torch import Tensor


@torch.library.custom_op("expertmesh::decision", mutates_args=())
def decision(ids: Tensor) -> Tensor:
    """A copy of integer decisions, by an operation that checkpointing policies can name."""
    return ids.clone()


@decision.register_fake
def _(ids: Tensor) -> Tensor:
    return torch.empty_like(ids)
