"""Activation checkpointing that never decides routing a second time."""

from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.models.context import BlockContext


def run_block(block: nn.Module, x_BSD: Tensor, context: BlockContext) -> Tensor:
    """Run a block and let autograd keep what it needs."""
    return block(x_BSD, context)


def run_block_checkpointed(block: nn.Module, x_BSD: Tensor, context: BlockContext) -> Tensor:
    """Run a block, keep its input and the routing decisions, and recompute the rest in backward."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, x_BSD, context, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_policy)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    if operation is torch.ops.expertmesh.decision.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
