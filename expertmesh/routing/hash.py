"""Hash layers: a table says which expert takes which word (arXiv 2106.04426)."""

from collections.abc import Callable
from typing import Literal, final

import torch
from torch import Tensor

from expertmesh.errors import UserError, nearest
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_ids, check_sizes
from expertmesh.routing.population import Alone, Arrangement
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.unscored import unscored


@final
class HashRouter(Router):
    """``e_t = table[id_t]``, weight 1: no gate, no loss, no capacity (arXiv 2106.04426).

    The paper's hash functions are tables: see ``random_table``, ``balanced_table``,
    ``clustered_table`` and ``dispersed_table``. The table is a buffer and is saved with the model.

    Args:
        dim: D.
        num_experts: E.
        table: int64 ``(V,)``, values in [0, E): the expert of each id.
        by: What is looked up: the ``"token"`` itself; the ``"previous"`` token of its sequence, for
            which the first one, and one behind padding, takes itself; its ``"position"`` in the
            sequence. The last two need whole sequences: decoding with a key-value cache shows a
            router one token at a time, which it would take for the first.
        layer: Not looked at; every router has one.

    Raises:
        ValueError: If the table or ``by`` is something else; and in forward, without token ids,
            for ids that are no integers, or for one beyond the table.
    """

    table_V: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        table: Tensor,
        *,
        by: Literal["token", "previous", "position"] = "token",
        layer: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_experts)
        if by not in _LOOKED_UP:
            raise UserError(
                f"by must be one of {', '.join(_LOOKED_UP)}, got {by!r}" + nearest(by, _LOOKED_UP)
            )
        if table.dim() != 1 or len(table) == 0 or table.dtype != torch.int64:
            raise UserError(
                "table must be int64 of shape (V,), an expert for each id; got "
                f"{table.dtype} of shape {tuple(table.shape)}"
            )
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= num_experts:
            raise UserError(
                f"table must hold experts from 0 to {num_experts - 1}, got {low} to {high}"
            )
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, 1, layer
        self.by = by
        self._given_V = table.clone()
        self.register_buffer("table_V", self._given_V.to(device=device, copy=True))

    @property
    def looks_up(self) -> str | None:
        """See ``Router.looks_up``."""
        return f"a table is looked up by {self.by!r}"

    def reset_parameters(self, seed: int) -> None:
        """Put the table back that was given, whatever the seed: memory may be new and empty."""
        self.table_V.copy_(self._given_V)

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, ids={len(self.table_V)}, "
            f"by={self.by!r}"
        )

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        sequence_length: int | None = None,
        key: RandomKey | None = None,
        routing: Routing | None = None,
    ) -> Routing:
        """See ``Router.forward``; ``x_TD`` is looked at for its shape only."""

        def look_up() -> Tensor:
            id_T = self._ids(len(x_TD), x_TD.device, token_ids, padding_mask, sequence_length, key)
            return self.table_V[id_T][:, None]

        return unscored(
            look_up, self.num_experts, x_TD=x_TD, padding_mask=padding_mask, routing=routing
        )

    def _ids(
        self,
        num_tokens: int,
        device: torch.device,
        token_ids: Tensor | None,
        padding_mask: Tensor | None,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> Tensor:
        if token_ids is None:
            if self.by != "position":
                raise UserError(
                    f"a hash router by {self.by!r} needs token_ids; call the layer with "
                    "token_ids= of x's shape without its width"
                )
            token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        check_ids(token_ids)
        if padding_mask is not None:
            token_ids = torch.where(padding_mask, 0, token_ids)
        if self.by != "token":
            whole_here = self.population.ranks_per_sequence == 1
            population = Alone() if whole_here else self.population
            order = population.arrange(num_tokens, sequence_length, key)
            token_ids = _LOOKED_UP[self.by](token_ids, padding_mask, order)
        self._check(token_ids)
        return token_ids

    def _check(self, id_T: Tensor) -> None:
        beyond = ((id_T < 0) | (id_T >= len(self.table_V))).any()
        if id_T.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(~beyond, "an id is beyond the hash router's table")
        elif beyond:
            raise UserError(
                f"ids by {self.by!r} must be from 0 to {len(self.table_V) - 1}, the table's last; "
                f"got {int(id_T.min())} to {int(id_T.max())}; make the table with as many entries "
                "as there are ids"
            )


def _itself(token_T: Tensor, padding_mask: Tensor | None, order: Arrangement) -> Tensor:
    return token_T


def _previous(token_T: Tensor, padding_mask: Tensor | None, order: Arrangement) -> Tensor:
    token_N = order.whole(token_T)
    first_N = _position(order, token_T.device) == 0
    padding_N = order.whole_padding(padding_mask)
    if padding_N is not None:
        first_N = first_N | padding_N.roll(1)
    return order.own(torch.where(first_N, token_N, token_N.roll(1)))


def _own_position(token_T: Tensor, padding_mask: Tensor | None, order: Arrangement) -> Tensor:
    return order.own(_position(order, token_T.device))


def _position(order: Arrangement, device: torch.device) -> Tensor:
    length = order.sequence_length or order.num_tokens
    return torch.arange(order.num_tokens, device=device) % max(length, 1)


_LOOKED_UP: dict[str, Callable[[Tensor, Tensor | None, Arrangement], Tensor]] = {
    "token": _itself,
    "previous": _previous,
    "position": _own_position,
}
