"""Routings whose experts no score has chosen: by table, by turn, at random."""

from collections.abc import Callable

import torch
from torch import Tensor

from expertmesh.routing.decision import decision
from expertmesh.routing.logits import wide_dtype
from expertmesh.routing.replay import recorded
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import count_experts


def unscored(
    choose: Callable[[], Tensor],
    num_experts: int,
    *,
    x_TD: Tensor,
    padding_mask: Tensor | None,
    routing: Routing | None,
) -> Routing:
    """A routing of given experts, each with weight 1/K.

    Args:
        choose: Gives int64 ``(T, K)``, values in [0, E); called unless ``routing`` is given.
        num_experts: E.
        x_TD: ``(T, D)``; says how wide the weights are.
        padding_mask: bool ``(T,)``, True for padding, or None.
        routing: A recorded decision to carry out in place of a choice.

    Returns:
        The routing; nothing in it carries a gradient.
    """
    if routing is None:
        expert_TK = choose()
        if padding_mask is not None:
            expert_TK = torch.where(padding_mask[:, None], num_experts, expert_TK)
        expert_TK = decision(expert_TK)
    else:
        expert_TK = recorded(routing, num_experts).expert_TK
    served_TK = expert_TK < num_experts
    return Routing(
        num_experts=num_experts,
        expert_TK=expert_TK,
        weight_TK=served_TK.to(wide_dtype(x_TD)) / expert_TK.shape[1],
        chosen_TK=expert_TK,
        load_E=count_experts(expert_TK, num_experts),
    )
