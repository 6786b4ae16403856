"""Routers without a choice, for benchmarks: random, in turn, always the same."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.random import label
from expertmesh.routing.by_place import Places, RouterByPlace
from expertmesh.routing.checks import check_sizes
from expertmesh.routing.draw import Draw
from expertmesh.routing.selection import top_k

_UNIFORM = label("uniform router")


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

    def choose(self, places: Places) -> Tensor:
        draw = Draw(places.key, self.layer, places.num_tokens, places.device, self.training)
        return top_k(draw.uniform(_UNIFORM, self.num_experts, torch.float32), self.k)


@final
class RoundRobinRouter(RouterByPlace):
    """Token ``t`` of the batch takes experts ``(t k + j) mod E``, j < k; weights 1/k.

    Loads differ by one at most where there is no padding. Arguments are ``RouterByPlace``'s.
    """

    def choose(self, places: Places) -> Tensor:
        order = self.population.arrange(places.num_tokens, places.sequence_length, places.key)
        place_T = order.own(torch.arange(order.num_tokens, device=places.device))
        turn_K = torch.arange(self.k, device=places.device)
        return (place_T[:, None] * self.k + turn_K) % self.num_experts


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

    def choose(self, places: Places) -> Tensor:
        expert_K = torch.tensor(self.experts, device=places.device)
        return expert_K.expand(places.num_tokens, self.k)
