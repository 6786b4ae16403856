"""Dispatch between ranks whose shapes never change: no host synchronisation, some padding."""

import torch
from torch import Tensor

from expertmesh.dispatch.collectives import Group, gather_sizes
from expertmesh.dispatch.dispatcher import Dispatched, Dispatcher
from expertmesh.dispatch.expert_ranks import ExpertRanks
from expertmesh.dispatch.transport import (
    Plan,
    return_rows,
    row_dtype,
    send_draws,
    send_tokens,
)
from expertmesh.errors import UserError
from expertmesh.kernels.grouping import group_by_expert
from expertmesh.routing import Routing


class StaticDispatcher(Dispatcher):
    """All-to-all of equal parts, for routers with a capacity.

    From one rank to another go ``min(T, L * most)`` rows, where ``most`` is the router's bound on
    the choices of this rank's tokens that name one expert (``Routing.most_per_expert``); rows
    without a token are empty. So no token is dropped that the router keeps. Capacity that is given
    out per sequence or per fixed number of tokens makes the parts small; over the whole
    micro-batch all of an expert's choices may come from one rank, and the bound is loose.

    The sizes are agreed on at the first call, the only one that waits for the device: later calls
    may bring fewer tokens, never more.

    Args:
        group: The ``(ep, etp)`` ranks, slices innermost.
        num_experts: E.
        etp: Slices of each expert.
        rounded: Whether the experts round what comes to autocast's dtype before all else. Then it
            travels rounded; otherwise, and without autocast, in the tokens' dtype.
    """

    def __init__(
        self, group: Group, num_experts: int, etp: int = 1, *, rounded: bool = False
    ) -> None:
        self.group = group
        self.rounded = rounded
        self.ranks = ExpertRanks(num_experts, group.size // etp, etp)
        self._slots: int | None = None

    def dispatch(self, x_TD: Tensor, routing: Routing, draw_T: Tensor | None = None) -> Dispatched:
        """See ``Dispatcher.dispatch``. Ids come out as those of this rank's L experts.

        Raises:
            UserError: If the router has no capacity, or the tokens need more rows than were
                agreed on.
        """
        with torch.no_grad():
            plan = self._plan(routing, x_TD)
            draw_R = None if draw_T is None else send_draws(draw_T, plan)
        x_RD, id_RK, weight_RK = send_tokens(
            x_TD, routing.expert_TK, routing.weight_TK, plan, self.ranks
        )
        return Dispatched(x_RD, id_RK, weight_RK, plan, draw_R)

    def combine(self, y_RD: Tensor, context: Plan) -> Tensor:
        """See ``Dispatcher.combine``."""
        return return_rows(y_RD, context)

    def _plan(self, routing: Routing, x_TD: Tensor) -> Plan:
        num_tokens = len(routing.expert_TK)
        slots = self._agreed_slots(routing)
        grouping = group_by_expert(self.ranks.destinations(routing.expert_TK), self.ranks.num_ranks)
        # The j-th token for rank p goes into outgoing row p * slots + j.
        end_P = grouping.offsets_E.to(torch.int64)
        begin_P = torch.cat([end_P.new_zeros(1), end_P[:-1]])
        place_N = torch.arange(len(grouping.order_N), device=end_P.device)
        rank_N = torch.searchsorted(end_P, place_N, right=True)
        nowhere = self.ranks.num_ranks * slots
        known_N = rank_N.clamp_max(self.ranks.num_ranks - 1)
        row_N = torch.where(
            rank_N < self.ranks.num_ranks, known_N * slots + place_N - begin_P[known_N], nowhere
        )
        token_S = row_N.new_full((nowhere + 1,), num_tokens)
        token_S = token_S.scatter_(0, row_N, grouping.row_N)[:nowhere]
        place_TJ = torch.where(grouping.valid_RK, row_N[grouping.inverse_RK], -1)
        empty_S = token_S == num_tokens
        parts = [slots] * self.ranks.num_ranks
        token_S = token_S.clamp_max(max(num_tokens - 1, 0))
        dtype = row_dtype(x_TD, rounded=self.rounded)
        return Plan(token_S, empty_S, place_TJ, parts, parts, self.group, x_TD.dtype, dtype)

    def _agreed_slots(self, routing: Routing) -> int:
        most = routing.most_per_expert
        if most is None:
            raise UserError(
                "static dispatch needs a router with a capacity, got dropless routing; set the "
                "router's capacity (and eval_factor for evaluation), or use the all-to-all "
                "dispatcher"
            )
        needed = min(len(routing.expert_TK), self.ranks.num_local * most)
        if self._slots is None:
            self._slots = max(gather_sizes(needed, self.group))
        if needed > self._slots:
            raise UserError(
                f"static dispatch agreed on {self._slots} rows per pair of ranks at its first "
                f"call, this call needs {needed}; begin with the largest batch, or use the "
                "all-to-all dispatcher"
            )
        return self._slots
