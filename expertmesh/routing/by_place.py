"""What routers share that look at where tokens stand, and not at what they hold."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_sizes
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.unscored import unscored


@dataclass(frozen=True)
class Places:
    """The tokens of one pass, seen from a rank.

    Attributes:
        num_tokens: T.
        device: Theirs.
        sequence_length: Tokens in a sequence, or None.
        key: Names the random numbers and says where each token stands, or None.
    """

    num_tokens: int
    device: torch.device
    sequence_length: int | None
    key: RandomKey | None


class RouterByPlace(Router):
    """``k`` experts by the token's place in the batch, each with weight 1/k.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        layer: Index that sets this router's draws, where it has any, apart from other layers'.

    Raises:
        ValueError: Unless 1 <= k <= E.
    """

    def __init__(self, dim: int, num_experts: int, k: int, *, layer: int = 0) -> None:
        super().__init__()
        check_sizes(dim, num_experts, k)
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, k, layer

    def reset_parameters(self, seed: int) -> None:
        """There are none."""

    @abstractmethod
    def choose(self, places: Places) -> Tensor:
        """int64 ``(T, k)``: the experts of tokens whose content is not looked at.

        Not called where a recorded routing is carried out again.
        """

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
        """See ``Router.forward``; only the tokens' places are looked at."""
        return unscored(
            partial(self.choose, Places(len(x_TD), x_TD.device, sequence_length, key)),
            self.num_experts,
            x_TD=x_TD,
            padding_mask=padding_mask,
            routing=routing,
        )
