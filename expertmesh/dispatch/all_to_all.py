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
    send_ids,
    send_tokens,
)
from expertmesh.kernels.grouping import group_by_expert
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
            id_RK = send_ids(routing.expert_TK, self.ranks.num_experts, plan)
            id_RK = self.ranks.localize(id_RK, self.group.index)
            draw_R = None if draw_T is None else send_draws(draw_T, plan)
        x_RD, weight_RK = send_tokens(x_TD, routing.weight_TK, plan)
        weight_RK = torch.where(id_RK < self.ranks.num_local, weight_RK, 0)
        return Dispatched(x_RD, id_RK, weight_RK, plan, draw_R)

    def combine(self, y_RD: Tensor, context: Plan) -> Tensor:
        """See ``Dispatcher.combine``."""
        return return_rows(y_RD, context)

    def _plan(self, expert_TK: Tensor, x_TD: Tensor) -> Plan:
        destination_TJ = self.ranks.destinations(expert_TK)
        grouping = group_by_expert(destination_TJ, self.ranks.num_ranks)
        sent_P = torch.diff(grouping.offsets_E, prepend=grouping.offsets_E.new_zeros(1))
        received_P = torch.empty_like(sent_P)
        dist.all_to_all_single(received_P, sent_P, group=self.group.process_group)
        self.group.traffic.add("counts", (self.group.size - 1) * sent_P.element_size())
        sent, received = torch.stack([sent_P, received_P]).tolist()
        return Plan(
            grouping.row_N[: sum(sent)],
            None,
            torch.where(grouping.valid_RK, grouping.inverse_RK, -1),
            sent,
            received,
            self.group,
            x_TD.dtype,
            row_dtype(x_TD, rounded=self.rounded),
        )
