"""Experts that choose tokens: the best tokens of each expert, as rows of one choice each."""

from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.logits import coarse
from expertmesh.routing.population import Alone, Arrangement, Population
from expertmesh.routing.scope import Scope, scope_size


class Groups(NamedTuple):
    """The groups of tokens out of which experts choose.

    Attributes:
        order: Of the tokens of all groups.
        size: Tokens of a group, padding included.
        slots: Tokens that each expert takes from a group.
    """

    order: Arrangement
    size: int
    slots: int


def groups_of(
    population: Population,
    scope: Scope,
    factor: float,
    num_experts: int,
    *,
    field: str,
    num_tokens: int,
    sequence_length: int | None,
    key: RandomKey | None,
) -> Groups:
    """Groups in which each expert takes ``floor(n factor / E)`` of n tokens.

    The size of a group counts padding, so that shapes are static, as with ``Capacity``. ``field``
    is the router's name for the factor.

    Raises:
        ValueError: If that is no token at all.
    """
    if scope == "sequence" and population.ranks_per_sequence == 1:
        population = Alone()  # every sequence lies whole on one rank
    order = population.arrange(num_tokens, sequence_length, key)
    size = scope_size(scope, order.num_tokens, order.sequence_length)
    # Nudged as Capacity's factors are: 1.1 * 30 / 3 is 11.
    slots = min(size, int(round(size * factor / num_experts, 9)))
    if slots == 0 and order.num_tokens > 0:
        raise UserError(
            f"experts that choose take {field} * tokens / experts = {factor} * {size} / "
            f"{num_experts} tokens, which rounds to zero; set {field} to at least "
            f"{num_experts / size:g} or route more tokens together"
        )
    return Groups(order, size, slots)


def rank_of(score_TE: Tensor, padding_mask: Tensor | None) -> Tensor:
    """int32 ``(T, E)`` that sort as scores of at least 0 do, to 12 bits; padding comes last."""
    rank_TE = coarse(score_TE).view(torch.int32)
    return rank_TE if padding_mask is None else rank_TE.masked_fill(padding_mask[:, None], -1)


def best_tokens(rank_NE: Tensor, groups: Groups) -> Tensor:
    """Each expert's tokens of highest rank, the earlier first among equals.

    Args:
        rank_NE: int32 ``(N, E)`` of all tokens, in their order.
        groups: Which of them are chosen from together.

    Returns:
        int64 ``(G, E, slots)``, places in the order.
    """
    # Contiguous by expert: selecting across the table's rows takes a quarter longer on a CPU.
    rank_GES = rank_NE.view(-1, groups.size, rank_NE.shape[1]).transpose(1, 2).contiguous()
    reversed_S = torch.arange(groups.size - 1, -1, -1, device=rank_NE.device)
    packed_GES = torch.add(reversed_S, rank_GES, alpha=1 << 32)
    # Which rows stand first within an expert matters to nobody; all keys differ, so the order is
    # the same each time.
    best_GEJ = packed_GES.topk(groups.slots, dim=-1, sorted=False).indices
    begin_G = torch.arange(len(rank_GES), device=rank_NE.device) * groups.size
    return best_GEJ if len(begin_G) == 1 else begin_G[:, None, None] + best_GEJ


def rows_of(
    place_GEJ: Tensor, groups: Groups, num_tokens: int, padding_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows of what experts chose among all tokens.

    Args:
        place_GEJ: int64 ``(G, E, slots)``, places in the order.
        groups: The groups.
        num_tokens: T, of this rank.
        padding_mask: bool ``(T,)``, or None; padding that was taken for want of tokens is let go.

    Returns:
        ``token_N`` and ``expert_N``, int64 ``(N,)``, E where an expert found too few tokens; and
        the places of the rows in ``place_GEJ``, flattened.
    """
    num_groups, num_experts, slots = place_GEJ.shape
    order, device = groups.order, place_GEJ.device
    expert_N = torch.arange(num_experts, device=device)[:, None].expand(num_groups, -1, slots)
    token_N, expert_N = place_GEJ.reshape(-1), expert_N.reshape(-1)
    row_N = torch.arange(len(token_N), device=device)
    everyone_P = torch.arange(order.num_tokens, device=device)
    own_T = order.own(everyone_P)
    if own_T is not everyone_P:  # else places are this rank's tokens in their order
        token_P = torch.full((order.num_tokens,), num_tokens, device=device)
        token_P[own_T] = torch.arange(num_tokens, device=device)
        token_N = token_P[token_N]
    if order.num_tokens != num_tokens:  # some are on other ranks
        row_N = (token_N < num_tokens).nonzero().flatten()
        token_N, expert_N = token_N[row_N], expert_N[row_N]
    if padding_mask is not None:
        expert_N = torch.where(padding_mask[token_N], num_experts, expert_N)
    return token_N, expert_N, row_N
