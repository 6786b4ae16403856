"""Rows to other ranks and back, as two autograd functions.

What dispatchers differ in is only the plan: which token goes into which outgoing row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.dispatch.collectives import Group, exchange_rows
from expertmesh.dispatch.expert_ranks import ExpertRanks
from expertmesh.kernels.dispatch import mask_others, pack_choices, take_rows, unpack_choices
from expertmesh.kernels.dtypes import autocast_dtype
from expertmesh.kernels.row_sum import sum_rows


@dataclass(frozen=True)
class Plan:
    """Which rows one rank sends and receives in one call of the layer.

    Integers are int64, or int32 where kernels made them.

    Attributes:
        token_N: The token of each outgoing row, rows for rank 0 first.
        empty_N: True where an outgoing row carries no token; None if every row does.
        place_TJ: The outgoing row of each destination of each token, by ascending rank where J
            is the number of ranks; -1 where there is none.
        sent: Rows for each rank.
        received: Rows from each rank.
        group: The ranks.
        token_dtype: Of the tokens, and of their sums when they are home.
        row_dtype: Of rows on their way, both ways: what the experts compute in.
    """

    token_N: Tensor
    empty_N: Tensor | None
    place_TJ: Tensor
    sent: list[int]
    received: list[int]
    group: Group
    token_dtype: torch.dtype
    row_dtype: torch.dtype

    def leave(self, value_TX: Tensor, kind: str) -> Tensor:
        """Tokens' values ``(T, ...)`` to the ranks they go to: ``(R, ...)``; no gradient."""
        rows_NX = take_rows(value_TX, self.token_N, self.empty_N, 0)
        return exchange_rows(rows_NX, self.sent, self.received, self.group, kind=kind)

    def come_home(self, rows_RX: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        """Rows back to their tokens, added in ``place_TJ``'s order: ``(T, ...)`` in ``dtype``.

        The sum is taken in float32 or wider.
        """
        rows_NX = exchange_rows(rows_RX, self.received, self.sent, self.group, kind=kind)
        return sum_rows(rows_NX, self.place_TJ, dtype)


def row_dtype(x_TD: Tensor, *, rounded: bool) -> torch.dtype:
    """What tokens travel in: autocast's dtype if the experts round to it, else their own."""
    autocast = autocast_dtype(x_TD.device.type)
    if not rounded or autocast is None or x_TD.dtype == torch.float64:
        return x_TD.dtype
    return autocast


def send_tokens(
    x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, plan: Plan, ranks: ExpertRanks
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with their choices to the experts' ranks.

    The tokens go, and their gradients come, in the plan's ``row_dtype``; weights in their own. Ids
    and weights go together, after the tokens: the GPU has the long exchange to do while the host
    prepares the rest.

    Args:
        x_TD: ``(T, D)``.
        expert_TK: Ids among all experts.
        weight_TK: Their combine weights.
        plan: Which token goes into which row.
        ranks: Which experts are whose.

    Returns:
        ``(R, D)``; ids among this rank's L experts, int64 ``(R, K)``, L where a choice is not this
        rank's to carry out; and weights ``(R, K)``, 0 there.
    """
    x_RD, id_RK, weight_RK = _Send.apply(x_TD, expert_TK, weight_TK, plan, ranks)
    return x_RD, id_RK, weight_RK


def send_draws(draw_T: Tensor, plan: Plan) -> Tensor:
    """Random numbers along with the tokens: int64 ``(R,)``."""
    return plan.leave(draw_T.unsqueeze(1), "draws").squeeze(1)


def return_rows(y_RD: Tensor, plan: Plan) -> Tensor:
    """Partial sums back to their tokens, which are their total: ``(T, D)``."""
    return _Return.apply(y_RD, plan)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        expert_TK: Tensor,
        weight_TK: Tensor,
        plan: Plan,
        ranks: ExpertRanks,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_RD = plan.leave(x_TD.to(plan.row_dtype), "dispatch")
        choice_NB = pack_choices(
            expert_TK, weight_TK, plan.token_N, plan.empty_N, ranks.num_experts
        )
        choice_RB = exchange_rows(choice_NB, plan.sent, plan.received, plan.group, kind="choices")
        first, num_local = ranks.first(plan.group.index), ranks.num_local
        id_RK, weight_RK = unpack_choices(choice_RB, first, num_local, weight_TK.dtype)
        ctx.plan, ctx.num_local = plan, num_local
        ctx.dim, ctx.weight_dtype = x_TD.shape[1], weight_TK.dtype
        ctx.save_for_backward(id_RK)
        ctx.mark_non_differentiable(id_RK)
        ctx.set_materialize_grads(False)  # no zeros for the ids
        return x_RD, id_RK, weight_RK

    @staticmethod
    def backward(
        ctx: Any, dx_RD: Tensor | None, _: None, dweight_RK: Tensor | None
    ) -> tuple[Tensor, None, Tensor, None, None]:
        plan, (id_RK,) = ctx.plan, ctx.saved_tensors
        if dx_RD is None:
            dx_RD = id_RK.new_zeros(len(id_RK), ctx.dim, dtype=plan.row_dtype)
        if dweight_RK is None:
            dweight_RK = id_RK.new_zeros(id_RK.shape, dtype=ctx.weight_dtype)
        dx_TD = plan.come_home(dx_RD, "dispatch backward", plan.token_dtype)
        dweight_RK = mask_others(dweight_RK, id_RK, ctx.num_local)
        dweight_TK = plan.come_home(dweight_RK, "weights backward", ctx.weight_dtype)
        return dx_TD, None, dweight_TK, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, plan: Plan) -> Tensor:
        ctx.plan, ctx.dtype = plan, y_RD.dtype
        return plan.come_home(y_RD.to(plan.row_dtype), "combine", plan.token_dtype)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        return plan.leave(dy_TD.to(plan.row_dtype), "combine backward").to(ctx.dtype), None
