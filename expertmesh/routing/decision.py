"""The operation through which every routing decision passes.

Activation checkpointing runs a forward pass again in backward. A router that decided anew could
decide otherwise (a changed weight, a nondeterministic kernel), and the gradients would belong to
experts that never ran. An operation of its own name lets a checkpointing policy keep its output,
a few integers per token, while everything else is recomputed.

Defined with ``torch.library.define``: ``custom_op`` imports the compiler at the first call.
"""

import torch
from torch import Tensor

torch.library.define("expertmesh::decision", "(Tensor ids) -> Tensor")


@torch.library.impl("expertmesh::decision", "CompositeExplicitAutograd")
def _decision(ids: Tensor) -> Tensor:
    return ids.clone()


@torch.library.register_fake("expertmesh::decision")
def _decision_fake(ids: Tensor) -> Tensor:
    return torch.empty_like(ids)


def decision(ids: Tensor) -> Tensor:
    """A copy of integer decisions, by an operation that checkpointing policies can name."""
    copied: Tensor = torch.ops.expertmesh.decision(ids)
    return copied
