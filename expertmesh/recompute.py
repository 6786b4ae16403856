"""Telling a first forward pass from its repetition in backward."""

import torch
from torch.utils.checkpoint import CheckpointFunction


def is_recompute() -> bool:
    """Whether this forward pass repeats an earlier one for activation checkpointing.

    The engine runs the repetition inside a backward pass, whose task then has an id. Gradient mode
    does not tell: reentrant checkpointing runs the first pass without gradients.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def is_reentrant() -> bool:
    """Whether reentrant checkpointing repeats this pass, in the backward pass of its function."""
    return isinstance(torch._C._current_autograd_node(), CheckpointFunction._backward_cls)
