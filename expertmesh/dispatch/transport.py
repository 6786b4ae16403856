"""Rows to other ranks and back, as two autograd functions.

What dispatchers differ in is only the plan: which token goes into which outgoing row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.dispatch.collectives import Group, exchange_rows
from expertmesh.kernels.dtypes import autocast_dtype
from expertmesh.kernels.row_sum import sum_rows

_ID = torch.int32


@dataclass(frozen=True)
class Plan:
    """Which rows one rank sends and receives in one call of the layer.

    Attributes:
        token_N: int64, the token of each outgoing row, rows for rank 0 first.
        empty_N: True where an outgoing row carries no token; None if every row does.
        place_TJ: int64, the outgoing row of each destination of each token, by ascending rank
            where J is the number of ranks; -1 where there is none.
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

    def leave(self, value_TX: Tensor, kind: str, fill: float = 0) -> Tensor:
        """Tokens' values ``(T, ...)`` to the ranks they go to: ``(R, ...)``; no gradient."""
        if self.empty_N is None:
            rows_NX = value_TX[self.token_N]
        elif len(value_TX) == 0:
            rows_NX = value_TX.new_full((len(self.token_N), *value_TX.shape[1:]), fill)
        else:
            rows_NX = value_TX[self.token_N].masked_fill_(self.empty_N.unsqueeze(1), fill)
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


def send_tokens(x_TD: Tensor, weight_TK: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Tokens with their combine weights to the experts' ranks: ``(R, D)`` and ``(R, K)``.

    The tokens go, and their gradients come, in the plan's ``row_dtype``; weights in their own.
    """
    return _Send.apply(x_TD, weight_TK, plan)


def send_ids(expert_TK: Tensor, sentinel: int, plan: Plan) -> Tensor:
    """Expert ids along with the tokens: int64 ``(R, K)``, the sentinel in rows without a token."""
    return plan.leave(expert_TK.to(_ID), "ids", sentinel).to(torch.int64)


def send_draws(draw_T: Tensor, plan: Plan) -> Tensor:
    """Random numbers along with the tokens: int64 ``(R,)``."""
    return plan.leave(draw_T.unsqueeze(1), "draws").squeeze(1)


def return_rows(y_RD: Tensor, plan: Plan) -> Tensor:
    """Partial sums back to their tokens, which are their total: ``(T, D)``."""
    return _Return.apply(y_RD, plan)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_TK: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        ctx.plan, ctx.weight_dtype = plan, weight_TK.dtype
        rows_RD = plan.leave(x_TD.to(plan.row_dtype), "dispatch")
        return rows_RD, plan.leave(weight_TK, "weights")

    @staticmethod
    def backward(ctx: Any, dx_RD: Tensor, dweight_RK: Tensor) -> tuple[Tensor, Tensor, None]:
        plan = ctx.plan
        dx_TD = plan.come_home(dx_RD, "dispatch backward", plan.token_dtype)
        dweight_TK = plan.come_home(dweight_RK, "weights backward", ctx.weight_dtype)
        return dx_TD, dweight_TK, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, plan: Plan) -> Tensor:
        ctx.plan, ctx.dtype = plan, y_RD.dtype
        return plan.come_home(y_RD.to(plan.row_dtype), "combine", plan.token_dtype)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        return plan.leave(dy_TD.to(plan.row_dtype), "combine backward").to(ctx.dtype), None
