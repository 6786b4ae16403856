"""The tokens that are routed together: this rank's, or those of several ranks.

Capacity and balance statistics belong to the model's micro-batch, however many ranks hold its
tokens. Routers ask here and never learn where the other tokens are.

All ranks must ask for the same things, of one size, in one order. So what is asked must not depend
on what differs between ranks: whether a rank was given a padding mask, how many tokens it has, or
whether a kernel takes them (none takes T = 0).
"""

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor

from expertmesh.random import RandomKey


class Arrangement(ABC):
    """The order of all tokens of one micro-batch.

    Attributes:
        num_tokens: N, tokens on all ranks.
        sequence_length: Tokens in a whole sequence; None where the input has no sequences.
    """

    num_tokens: int
    sequence_length: int | None

    @abstractmethod
    def whole(self, value_TX: Tensor) -> Tensor:
        """All ranks' values in the micro-batch's order, ``(N, ...)``; without gradient."""

    @abstractmethod
    def whole_padding(self, padding_mask: Tensor | None) -> Tensor | None:
        """All ranks' padding masks, bool ``(N,)``; None is a rank whose tokens all count.

        None where no other rank could have padding.
        """

    @abstractmethod
    def own(self, value_NX: Tensor) -> Tensor:
        """This rank's values out of all: ``(T, ...)``."""

    @abstractmethod
    def group_sums(self, value_TX: Tensor, size: int) -> Tensor:
        """This rank's part of the sums over each ``size`` consecutive tokens: ``(groups, ...)``."""


class Population(ABC):
    """The ranks whose tokens form one micro-batch.

    Attributes:
        num_ranks: How many.
        ranks_per_sequence: Ranks among which the tokens of one sequence are cut up.
        sequence_part: Which of how many parts of its sequences this rank has; they differ in
            length by one token at most.
    """

    num_ranks: int
    ranks_per_sequence: int
    sequence_part: tuple[int, int]

    @abstractmethod
    def total(self, value: Tensor, *, copies: int = 1) -> Tensor:
        """The sum over ranks; its gradient flows through this rank's addend.

        Args:
            value: This rank's addend.
            copies: On how many ranks the same addend stands. The sum has them all, and so that
                none of the gradient is lost, it is multiplied by their number.
        """

    @abstractmethod
    def sequence_total(self, value_BX: Tensor) -> Tensor:
        """As ``total``, over the ranks that hold parts of the same sequences: ``(B, ...)``."""

    @abstractmethod
    def arrange(
        self, num_tokens: int, sequence_length: int | None, key: RandomKey | None
    ) -> Arrangement:
        """The order of all tokens.

        Args:
            num_tokens: T, of this rank.
            sequence_length: Tokens of a sequence on this rank, or None.
            key: Its ``token_index`` says where each token belongs; None takes ranks in order.
        """

    @abstractmethod
    def for_training(self, loss: Tensor) -> Tensor:
        """The loss with the gradient that the gradients' reduction over ranks asks for."""


@final
class Alone(Population):
    """One rank."""

    num_ranks = 1
    ranks_per_sequence = 1
    sequence_part = (0, 1)

    def total(self, value: Tensor, *, copies: int = 1) -> Tensor:
        return value

    def sequence_total(self, value_BX: Tensor) -> Tensor:
        return value_BX

    def arrange(
        self, num_tokens: int, sequence_length: int | None, key: RandomKey | None
    ) -> Arrangement:
        return _InOrder(num_tokens, sequence_length)

    def for_training(self, loss: Tensor) -> Tensor:
        return loss


@final
class _InOrder(Arrangement):
    def __init__(self, num_tokens: int, sequence_length: int | None) -> None:
        self.num_tokens = num_tokens
        self.sequence_length = sequence_length

    def whole(self, value_TX: Tensor) -> Tensor:
        return value_TX

    def whole_padding(self, padding_mask: Tensor | None) -> Tensor | None:
        return padding_mask

    def own(self, value_NX: Tensor) -> Tensor:
        return value_NX

    def group_sums(self, value_TX: Tensor, size: int) -> Tensor:
        return value_TX.reshape(-1, size, *value_TX.shape[1:]).sum(dim=1)
