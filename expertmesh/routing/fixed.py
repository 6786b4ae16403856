"""Routers without a choice, for benchmarks: random, in turn, always the same."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.random import RandomKey, label
from expertmesh.routing.draw import Draw
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import top_k
from expertmesh.routing.unscored import check_sizes, unscored

_UNIFORM = label("uniform router")


@final
class UniformRouter(Router):
    """``k`` different experts for each token, every set of them as likely; weights 1/k.

    The mean load is fair, a step's is that of a multinomial draw. In evaluation the draw depends on
    the token's place alone.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        layer: Index that sets this router's draws apart from other layers'.

    Raises:
        ValueError: Unless 1 <= k <= E.
    """

    def __init__(self, dim: int, num_experts: int, k: int, *, layer: int = 0) -> None:
        super().__init__()
        check_sizes(dim, num_experts, k)
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, k, layer

    def reset_parameters(self, seed: int) -> None:
        """There are none."""

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
        """See ``Router.forward``; only the number of tokens is looked at."""
        draw = Draw(key, self.layer, len(x_TD), x_TD.device, self.training)
        expert_TK = top_k(draw.uniform(_UNIFORM, self.num_experts, torch.float32), self.k)
        return unscored(
            expert_TK, self.num_experts, x_TD=x_TD, padding_mask=padding_mask, routing=routing
        )


@final
class RoundRobinRouter(Router):
    """Token ``t`` of the batch takes experts ``(t k + j) mod E``, j < k; weights 1/k.

    Loads differ by one at most where there is no padding.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        layer: Not looked at; every router has one.

    Raises:
        ValueError: Unless 1 <= k <= E.
    """

    def __init__(self, dim: int, num_experts: int, k: int, *, layer: int = 0) -> None:
        super().__init__()
        check_sizes(dim, num_experts, k)
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, k, layer

    def reset_parameters(self, seed: int) -> None:
        """There are none."""

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
        order = self.population.arrange(len(x_TD), sequence_length, key)
        place_T = order.own(torch.arange(order.num_tokens, device=x_TD.device))
        turn_TK = place_T[:, None] * self.k + torch.arange(self.k, device=x_TD.device)
        return unscored(
            turn_TK % self.num_experts,
            self.num_experts,
            x_TD=x_TD,
            padding_mask=padding_mask,
            routing=routing,
        )


@final
class FixedRouter(Router):
    """The same experts for every token; weights 1/k. The worst balance there is.

    Args:
        dim: D.
        num_experts: E.
        experts: The k experts, all different.
        layer: Not looked at; every router has one.

    Raises:
        ValueError: If there are none, one comes twice or is beyond E.
    """

    def __init__(
        self, dim: int, num_experts: int, experts: Sequence[int] = (0,), *, layer: int = 0
    ) -> None:
        super().__init__()
        check_sizes(dim, num_experts)
        self.experts = tuple(experts)
        known = all(0 <= expert < num_experts for expert in self.experts)
        if not self.experts or len(set(self.experts)) < len(self.experts) or not known:
            raise UserError(
                f"experts must be different numbers from 0 to {num_experts - 1}, at least one; "
                f"got {list(experts)}"
            )
        self.dim, self.num_experts, self.layer = dim, num_experts, layer
        self.k = len(self.experts)

    def reset_parameters(self, seed: int) -> None:
        """There are none."""

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
        """See ``Router.forward``; only the number of tokens is looked at."""
        expert_K = torch.tensor(self.experts, device=x_TD.device)
        return unscored(
            expert_K.expand(len(x_TD), self.k),
            self.num_experts,
            x_TD=x_TD,
            padding_mask=padding_mask,
            routing=routing,
        )
