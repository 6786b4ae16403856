"""Routers that look at places alone; for benchmarks: random, in turn, always the same."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.random import RandomKey, label
from expertmesh.routing.checks import check_sizes
from expertmesh.routing.draw import Draw
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import top_k
from expertmesh.routing.unscored import unscored

_UNIFORM = label("uniform router")


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
    def choose(
        self,
        num_tokens: int,
        device: torch.device,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> Tensor:
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
            partial(self.choose, len(x_TD), x_TD.device, sequence_length, key),
            self.num_experts,
            x_TD=x_TD,
            padding_mask=padding_mask,
            routing=routing,
        )


@final
class UniformRouter(RouterByPlace):
    """``k`` different experts for each token, every set of them as likely; weights 1/k.

    The mean load is fair, a step's is that of a multinomial draw. In evaluation the draw depends on
    the token's place alone. Arguments are ``RouterByPlace``'s.
    """

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        return "experts are drawn, not chosen"

    def choose(
        self,
        num_tokens: int,
        device: torch.device,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> Tensor:
        draw = Draw(key, self.layer, num_tokens, device, self.training)
        return top_k(draw.uniform(_UNIFORM, self.num_experts, torch.float32), self.k)


@final
class RoundRobinRouter(RouterByPlace):
    """Token ``t`` of the batch takes experts ``(t k + j) mod E``, j < k; weights 1/k.

    Loads differ by one at most where there is no padding. Arguments are ``RouterByPlace``'s.
    """

    def choose(
        self,
        num_tokens: int,
        device: torch.device,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> Tensor:
        order = self.population.arrange(num_tokens, sequence_length, key)
        place_T = order.own(torch.arange(order.num_tokens, device=device))
        return (place_T[:, None] * self.k + torch.arange(self.k, device=device)) % self.num_experts


@final
class FixedRouter(RouterByPlace):
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
        check_sizes(dim, num_experts)
        known = all(0 <= expert < num_experts for expert in experts)
        if not experts or len(set(experts)) < len(experts) or not known:
            raise UserError(
                f"experts must be different numbers from 0 to {num_experts - 1}, at least one; "
                f"got {list(experts)}"
            )
        super().__init__(dim, num_experts, len(experts), layer=layer)
        self.experts = tuple(experts)

    def choose(
        self,
        num_tokens: int,
        device: torch.device,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> Tensor:
        return torch.tensor(self.experts, device=device).expand(num_tokens, self.k)
