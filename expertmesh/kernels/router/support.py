"""For which operands the router's kernels are, and why not for others."""

import torch
from torch import Tensor

from expertmesh.kernels.triton_support import triton_refusal

_MOST_EXPERTS = 1024


def serves(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether ``router_logits`` and what follows it are for these operands."""
    if x_TD.shape[0] == 0:
        return False
    return logits_refusal(x_TD.device, x_TD.dtype, weight_ED.dtype, weight_ED.shape[0]) is None


def counts(table_TE: Tensor) -> bool:
    """Whether the kernels of counters and balance losses are for these logits or scores."""
    if table_TE.shape[0] == 0:
        return False
    return statistics_refusal(table_TE.device, table_TE.dtype, table_TE.shape[1]) is None


def logits_refusal(
    device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype, num_experts: int
) -> str | None:
    """Why the kernels of logits, choice and gates cannot run; None if they can.

    Args:
        device: Where the tensors lie.
        dtype: Of the tokens.
        weight_dtype: Of the router's weight.
        num_experts: E.
    """
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"its kernels take bfloat16 tokens, not {dtype}"
    if device.type == "cuda" and weight_dtype not in (torch.bfloat16, torch.float32):
        return f"its kernels take bfloat16 and float32 weights, not {weight_dtype}"
    return _refusal(device, num_experts)


def statistics_refusal(device: torch.device, dtype: torch.dtype, num_experts: int) -> str | None:
    """Why the kernels of counters and balance losses cannot run; None if they can.

    Args:
        device: Where the tensors lie.
        dtype: Of the logits or scores.
        num_experts: E.
    """
    if device.type == "cuda" and dtype != torch.float32:
        return f"its kernels take float32 scores, not {dtype}"
    return _refusal(device, num_experts)


def _refusal(device: torch.device, num_experts: int) -> str | None:
    if device.type != "cuda":
        return "its kernels are for GPUs"
    if num_experts > _MOST_EXPERTS:
        return f"its kernels take at most {_MOST_EXPERTS} experts, got {num_experts}"
    return triton_refusal(device)
