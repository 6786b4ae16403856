"""Dropless dispatch between ranks: as many rows as there are, no padding."""

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.dispatch.collectives import Group
from expertmesh.dispatch.dispatcher import Dispatched, Dispatcher
from expertmesh.dispatch.expert_ranks import ExpertRanks
from expertmesh.dispatch.transport import (
    Plan,
    return_rows,
    row_dtype,
    send_draws,
    send_tokens,
)
from expertmesh.kernels.dispatch import places
from expertmesh.routing import Routing


class AllToAllDispatcher(Dispatcher):
    """Uneven all-to-all: each token once to each rank that holds one of its experts.

    The host learns the row counts once per call, all of them together; nothing else waits for the
    device. Ranks without tokens, and ranks to which no token goes, take part like the others.

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

    def dispatch(self, x_TD: Tensor, routing: Routing, draw_T: Tensor | None = None) -> Dispatched:
        """See ``Dispatcher.dispatch``. Ids come out as those of this rank's L experts."""
        with torch.no_grad():
            plan = self._plan(routing.expert_TK, x_TD)
            draw_R = None if draw_T is None else send_draws(draw_T, plan)
        x_RD, id_RK, weight_RK = send_tokens(
            x_TD, routing.expert_TK, routing.weight_TK, plan, self.ranks
        )
        return Dispatched(x_RD, id_RK, weight_RK, plan, draw_R)

    def combine(self, y_RD: Tensor, context: Plan) -> Tensor:
        """See ``Dispatcher.combine``."""
        return return_rows(y_RD, context)

    def _plan(self, expert_TK: Tensor, x_TD: Tensor) -> Plan:
        token_N, place_TJ, offset_P1 = places(
            self.ranks.destinations(expert_TK), self.ranks.num_ranks
        )
        # Sent and received, in one table that the host reads at once.
        count_2P = offset_P1.new_empty(2, self.ranks.num_ranks)
        torch.diff(offset_P1, out=count_2P[0])
        dist.all_to_all_single(count_2P[1], count_2P[0], group=self.group.process_group)
        self.group.traffic.add("counts", (self.group.size - 1) * count_2P.element_size())
        sent, received = count_2P.tolist()
        return Plan(
            token_N[: sum(sent)],
            None,
            place_TJ,
            sent,
            received,
            self.group,
            x_TD.dtype,
            row_dtype(x_TD, rounded=self.rounded),
        )
