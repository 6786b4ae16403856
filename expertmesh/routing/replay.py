"""Decisions that were recorded and are carried out again."""

from typing import Literal

from expertmesh.errors import UserError
from expertmesh.routing.routing import Routing


def recorded(
    routing: Routing, num_experts: int, chosen_by: Literal["tokens", "experts", "either"] = "tokens"
) -> Routing:
    """The routing, once it is one that the router can carry out.

    Args:
        routing: The record.
        num_experts: E of the router.
        chosen_by: Whether the router's rows are tokens, or the choices of experts.

    Raises:
        ValueError: If it comes from a router of other experts, or of the other kind.
    """
    if routing.num_experts != num_experts:
        raise UserError(
            f"routing must be recorded from a router of num_experts={num_experts}, got one of "
            f"{routing.num_experts}"
        )
    found = "tokens" if routing.token_N is None else "experts"
    if chosen_by not in ("either", found):
        raise UserError(
            f"routing must be recorded from a router in which {chosen_by} choose, got one in which "
            f"{found} do"
        )
    return routing
