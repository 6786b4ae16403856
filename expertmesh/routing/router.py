"""The interface of every router."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from expertmesh.random import RandomKey
from expertmesh.routing.population import Alone, Population
from expertmesh.routing.routing import Routing


class Router(nn.Module, ABC):
    """Maps tokens to experts. Subclasses are final.

    Attributes:
        num_experts: E.
        dim: D.
        layer: Index that sets this router's random draws apart from those of other layers.
        population: The ranks whose tokens are routed together.
    """

    num_experts: int
    dim: int
    layer: int
    population: Population

    def __init__(self) -> None:
        super().__init__()
        self.population = Alone()

    @property
    def leaks(self) -> str | None:
        """Why what a token gets may depend on later tokens of its sequence; None if it does not.

        A decoder trained with such a router sees what it is to predict.
        """
        return None

    @property
    def draws(self) -> str | None:
        """Why equal tokens may be routed apart by random numbers, and what stops it; or None.

        A capacity, for which tokens compete, is no part of it.
        """
        return None

    @property
    def looks_up(self) -> str | None:
        """What of each token it looks at in place of ``x_TD``, in a clause; None if it does not.

        Such a router cannot decide by one vector that stands for many tokens.
        """
        return None

    @abstractmethod
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
        """Decide which experts take which tokens.

        Args:
            x_TD: ``(T, D)``.
            token_ids: int64 ``(T,)``; vocabulary ids, for routers that look at them.
            padding_mask: bool ``(T,)``, True for padding: takes no slot, enters no statistic.
            sequence_length: Tokens in a sequence; T is a multiple of it.
            key: Names the random numbers; None draws a seed from torch's generator.
            routing: A recorded decision to carry out again. Its expert ids are taken, its weights
                are computed anew from this router's scores, with gradient.

        Returns:
            The decision. Scores and weights are float32 or wider whatever autocast says.
        """

    @abstractmethod
    def reset_parameters(self, seed: int) -> None:
        """Draw the initial values again, a function of the seed alone."""
