"""The interface of every dispatcher."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from expertmesh.routing import Routing


@dataclass(frozen=True)
class Dispatched:
    """Token rows on the rank that holds their experts.

    Attributes:
        x_RD: ``(R, D)``.
        expert_RK: int64 ``(R, K)``; the sentinel E where a choice is not this rank's to carry out.
        weight_RK: ``(R, K)``, zero at sentinels.
        context: What ``combine`` needs to bring the rows home.
        draw_R: int64 ``(R,)``, the random number of each row's token, if there are any.
    """

    x_RD: Tensor
    expert_RK: Tensor
    weight_RK: Tensor
    context: Any
    draw_R: Tensor | None = None


class Dispatcher(ABC):
    """Transport only: moves token rows to their experts' ranks and the results back.

    Not a module: it has no parameters and changes no number.
    """

    @abstractmethod
    def dispatch(self, x_TD: Tensor, routing: Routing, draw_T: Tensor | None = None) -> Dispatched:
        """Send each token once to each rank that holds one of its experts.

        Args:
            x_TD: ``(T, D)``.
            routing: Where to.
            draw_T: int64 ``(T,)``, a random number of each token that goes with it, or None.
        """

    @abstractmethod
    def combine(self, y_RD: Tensor, context: Any) -> Tensor:
        """Bring the rows ``(R, D)`` home and add what belongs to one token: ``(T, D)``."""
