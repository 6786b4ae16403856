"""Routings whose experts no score has chosen: by table, by turn, at random."""

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.routing.decision import decision
from expertmesh.routing.logits import wide_dtype
from expertmesh.routing.replay import recorded
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import count_experts


def unscored(
    expert_TK: Tensor,
    num_experts: int,
    *,
    x_TD: Tensor,
    padding_mask: Tensor | None,
    routing: Routing | None,
) -> Routing:
    """A routing of given experts, each with weight 1/K.

    Args:
        expert_TK: int64 ``(T, K)``, values in [0, E).
        num_experts: E.
        x_TD: ``(T, D)``; says how wide the weights are.
        padding_mask: bool ``(T,)``, True for padding, or None.
        routing: A recorded decision to carry out in place of ``expert_TK``.

    Returns:
        The routing; nothing in it carries a gradient.
    """
    if routing is None:
        if padding_mask is not None:
            expert_TK = torch.where(padding_mask[:, None], num_experts, expert_TK)
        expert_TK = decision(expert_TK)
    else:
        expert_TK = recorded(routing, num_experts).expert_TK
    weight_TK = torch.where(expert_TK < num_experts, 1.0 / expert_TK.shape[1], 0.0)
    return Routing(
        num_experts=num_experts,
        expert_TK=expert_TK,
        weight_TK=weight_TK.to(wide_dtype(x_TD)),
        chosen_TK=expert_TK,
        load_E=count_experts(expert_TK, num_experts),
        dropped_TK=torch.zeros_like(expert_TK, dtype=torch.bool),
    )


def check_sizes(dim: int, num_experts: int, k: int = 1) -> None:
    """Refuse widths and counts that no router can have.

    Raises:
        ValueError: Naming the field.
    """
    for field, value in (("dim", dim), ("num_experts", num_experts)):
        if value < 1:
            raise UserError(f"{field} must be at least 1, got {value}")
    if not 1 <= k <= num_experts:
        raise UserError(
            f"k must be between 1 and num_experts={num_experts}, got {k}; "
            f"set k <= {num_experts} or raise num_experts"
        )
