"""Tokens of one micro-batch that lie on several ranks."""

from typing import Any, final

import torch
from torch import Tensor

from expertmesh.dispatch.collectives import Group, all_gather, gather_sizes, total
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.population import Arrangement, Population


@final
class RankPopulation(Population):
    """The tokens of all ranks of a pipeline stage.

    Args:
        group: All ranks of the stage, in the order of the dense grid.
        sequence_group: The ranks that hold parts of this rank's sequences, ``(cp, tp)``.
        averaged: Ranks over which a wrapper averages gradients (DDP); 1 where they are summed.
    """

    def __init__(self, group: Group, sequence_group: Group, *, averaged: int = 1) -> None:
        self.group = group
        self.sequence_group = sequence_group
        self.averaged = averaged
        self.num_ranks = group.size
        self.ranks_per_sequence = sequence_group.size
        self.sequence_part = (sequence_group.index, sequence_group.size)
        self._last: tuple[Tensor, _RankArrangement] | None = None

    def total(self, value: Tensor, *, copies: int = 1) -> Tensor:
        return total(value, self.group, gradient_factor=copies)

    def sequence_total(self, value_BX: Tensor) -> Tensor:
        if self.ranks_per_sequence == 1:
            return value_BX
        # A rank whose slice of the sequences is empty does not know how many there are.
        missing = max(gather_sizes(len(value_BX), self.sequence_group)) - len(value_BX)
        filling = value_BX.new_zeros(missing, *value_BX.shape[1:])
        return total(torch.cat([value_BX, filling]), self.sequence_group)

    def arrange(
        self, num_tokens: int, sequence_length: int | None, key: RandomKey | None
    ) -> Arrangement:
        """See ``Population.arrange``. The ranks' numbers of tokens are exchanged once per key."""
        if key is None:
            if self.ranks_per_sequence > 1:
                raise UserError(
                    "the tokens of one sequence lie on several ranks and must be told apart; "
                    "give key=RandomKey(seed, token_index) with each token's index in the batch"
                )
            return _RankArrangement(self, num_tokens, sequence_length, None)
        # Layers of one forward pass share the key, so they share the exchange too.
        if self._last is None or self._last[0] is not key.token_index:
            order = _RankArrangement(self, num_tokens, sequence_length, key.token_index)
            self._last = (key.token_index, order)
        return self._last[1]

    def for_training(self, loss: Tensor) -> Tensor:
        return loss if self.averaged == 1 else _ScaleGradient.apply(loss, self.averaged)


@final
class _RankArrangement(Arrangement):
    def __init__(
        self,
        population: RankPopulation,
        num_tokens: int,
        sequence_length: int | None,
        token_index: Tensor | None,
    ) -> None:
        group = self._group = population.group
        self._sizes = gather_sizes(num_tokens, group)
        self.num_tokens = sum(self._sizes)
        self.sequence_length = sequence_length
        if sequence_length is not None:
            parts = gather_sizes(sequence_length, population.sequence_group)
            self.sequence_length = sum(parts)
        begin = sum(self._sizes[: group.index])
        own = slice(begin, begin + num_tokens)
        if token_index is None:
            self._order_N = None
            self._place_T = torch.arange(own.start, own.stop, device=group.device)
        else:
            index_N = all_gather(token_index.reshape(-1), group, sizes=self._sizes)
            self._order_N = index_N.argsort(stable=True)
            self._place_T = self._order_N.argsort(stable=True)[own]

    def whole(self, value_TX: Tensor) -> Tensor:
        value_NX = all_gather(value_TX.detach(), self._group, sizes=self._sizes)
        return value_NX if self._order_N is None else value_NX[self._order_N]

    def whole_padding(self, padding_mask: Tensor | None) -> Tensor:
        # Asked for even where this rank has none: another may.
        if padding_mask is None:
            padding_mask = torch.zeros_like(self._place_T, dtype=torch.bool)
        return self.whole(padding_mask)

    def own(self, value_NX: Tensor) -> Tensor:
        return value_NX[self._place_T]

    def group_sums(self, value_TX: Tensor, size: int) -> Tensor:
        sums_GX = value_TX.new_zeros(self.num_tokens // size, *value_TX.shape[1:])
        return sums_GX.index_add(0, self._place_T // size, value_TX)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None
