"""The Mixture-of-Experts layer: route, dispatch, experts, combine.

Letters in names and docstrings: T tokens on this rank, D model width, F expert hidden width,
E experts of the model, K choices per token, R token rows on this rank after dispatch.
"""

import dataclasses
from functools import reduce
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.dispatch import Dispatcher, LocalDispatcher
from expertmesh.errors import UserError
from expertmesh.experts import Experts
from expertmesh.metrics import Metric, RoutingMeter
from expertmesh.random import RandomKey
from expertmesh.recompute import is_recompute, is_reentrant
from expertmesh.routing import Router, Routing
from expertmesh.routing.attach import attach_loss
from expertmesh.routing.draw import Draw

__all__ = ["MoE", "MoELoss", "moe_layers", "set_loss_scale"]

_DROPOUT = random.label("expert dropout")


class MoE(nn.Module):
    """``y_t = sum_k w_tk E_{e_tk}(x_t) + shared(x_t)`` for each token t.

    A token whose choices were all dropped, and padding, get 0 from the routed experts, so the layer
    belongs inside a residual branch.

    Args:
        router: Decides which experts take which tokens.
        experts: The experts, as many as the router knows.
        dispatcher: Moves tokens to their experts; None where all experts are on this rank.
        shared: A module that every token passes through, added to the routed output, or None.
        losses: ``"attach"``: balance losses are tied to the output and train under any loop, and
            never appear in the main loss. ``"return"``: the caller adds them, through ``MoELoss``
            or from the returned ``Routing``. Activation checkpointing must then be of the kind
            ``use_reentrant=False``: the other has no graph for them to stay in.

    Raises:
        ValueError: If router and experts are swapped or disagree, or ``losses`` is something else.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        dispatcher: Dispatcher | None = None,
        shared: nn.Module | None = None,
        losses: Literal["attach", "return"] = "attach",
    ) -> None:
        super().__init__()
        if losses not in ("attach", "return"):
            raise UserError(f"losses must be 'attach' or 'return', got {losses!r}")
        for field, part, kind in (("router", router, Router), ("experts", experts, Experts)):
            if not isinstance(part, kind):
                raise UserError(
                    f"{field} must be an instance of {kind.__name__}, got "
                    f"{type(part).__name__}; the router comes first: set MoE(router, experts)"
                )
        for field in ("num_experts", "dim"):
            ours, theirs = getattr(router, field), getattr(experts, field)
            if ours != theirs:
                raise UserError(
                    f"router and experts must agree on {field}: the router has {ours}, the experts "
                    f"{theirs}; set both to the same"
                )
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatcher = dispatcher if dispatcher is not None else LocalDispatcher()
        self.losses = losses
        self.meter = RoutingMeter(router.num_experts)
        # Not a buffer: it is set from outside at each step and must not be cast with the model.
        self.loss_scale = torch.ones((), dtype=torch.float64, device="cpu")
        self._uncollected: list[Tensor] = []

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        key: RandomKey | None = None,
        routing: Routing | None = None,
        return_routing: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        key: RandomKey | None = None,
        routing: Routing | None = None,
        return_routing: Literal[True],
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        token_ids: Tensor | None = None,
        key: RandomKey | None = None,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Send each token through its experts.

        Args:
            x: ``(..., D)``; the dim before D is the sequence, if there is one.
            padding_mask: bool ``(...)``, True for padding: it takes no slot, enters no statistic.
            token_ids: int64 ``(...)``; vocabulary ids, for routers that look at them.
            key: Names the random numbers of this step; None draws from torch's generator.
            routing: A recorded decision to carry out again, for this ``x``'s tokens.
            return_routing: Return ``(y, Routing)``.

        Returns:
            ``y`` of ``x``'s shape and dtype, and the routing if asked for. With
            ``losses="attach"`` the returned losses carry no gradient: it is in the graph already.

        Raises:
            ValueError: If a shape does not fit.
        """
        self._check(x, padding_mask, token_ids, routing)
        x_TD = x.reshape(-1, x.shape[-1])
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        sequence_length = x.shape[-2] if x.dim() > 2 else None

        decided = self.router(
            x_TD,
            token_ids=None if token_ids is None else token_ids.reshape(-1),
            padding_mask=padding_T,
            sequence_length=sequence_length,
            key=key,
            routing=routing,
        )
        draw_T = self._draws(key, x_TD)
        sent = self.dispatcher.dispatch(
            _rows(x_TD, decided), decided, None if draw_T is None else _rows(draw_T, decided)
        )
        drawn = {} if sent.draw_R is None else {"draw_R": sent.draw_R}
        y_RD = self.experts(sent.x_RD, sent.expert_RK, sent.weight_RK, **drawn)
        y_TD = _tokens(self.dispatcher.combine(y_RD, sent.context), decided, len(x_TD))
        if self.shared is not None:
            y_TD = (y_TD + self.shared(x_TD)).to(x.dtype)

        part = self.router.population.sequence_part
        self.meter.count(decided, len(x_TD), padding_T, sequence_length, part)
        y_TD, decided = self._hand_over(y_TD, decided, returned=return_routing)
        y = y_TD.reshape(x.shape)
        return (y, decided) if return_routing else y

    def reset_parameters(self, seed: int) -> None:
        """Draw router and experts again, a function of the seed alone; the shared module is not."""
        self.router.reset_parameters(random.fold(seed, "router"))
        self.experts.reset_parameters(random.fold(seed, "experts"))

    def metrics(self, *, reset: bool = True) -> dict[str, Metric]:
        """Counters of this layer's routing since the last reset; see ``expertmesh.metrics``."""
        return self.meter.read(reset=reset)

    def collect_losses(self) -> list[Tensor]:
        """Balance losses of forward passes since the last call; for ``losses="return"``."""
        collected, self._uncollected = self._uncollected, []
        return collected

    def __getstate__(self) -> dict[str, Any]:
        # A copy has seen no forward pass; and graphs can be neither copied nor pickled.
        fresh = {"_uncollected": [], "meter": RoutingMeter(self.router.num_experts)}
        return self.__dict__ | fresh

    def _draws(self, key: RandomKey | None, x_TD: Tensor) -> Tensor | None:
        """A random number for each token, where the experts drop hidden units."""
        if not self.experts.training or self.experts.dropout == 0:
            return None
        return Draw(key, self.router.layer, len(x_TD), x_TD.device, training=True).bits(_DROPOUT)

    def _hand_over(
        self, y_TD: Tensor, decided: Routing, *, returned: bool
    ) -> tuple[Tensor, Routing]:
        """Give the balance losses to whoever trains with them, exactly once."""
        if not decided.losses or not torch.is_grad_enabled():
            return y_TD, decided
        if self.losses == "attach":
            total = reduce(torch.add, decided.losses.values())
            y_TD = attach_loss(y_TD, total, self.loss_scale)
            detached = {name: loss.detach() for name, loss in decided.losses.items()}
            decided = dataclasses.replace(decided, losses=detached)
        elif not returned and not is_recompute():
            self._uncollected.extend(decided.losses.values())
        elif not returned and is_reentrant():
            raise UserError(
                "losses='return' loses its balance losses under reentrant checkpointing, whose "
                "forward pass has no gradient; set checkpoint(..., use_reentrant=False), or "
                "losses='attach'"
            )
        return y_TD, decided

    def _check(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        token_ids: Tensor | None,
        routing: Routing | None,
    ) -> None:
        dim = self.experts.dim
        if x.dim() < 1 or x.shape[-1] != dim:
            raise UserError(f"x must have shape (..., {dim}), got {tuple(x.shape)}")
        tokens = x.shape[:-1]
        for field, value in (("padding_mask", padding_mask), ("token_ids", token_ids)):
            if value is not None and value.shape != tokens:
                raise UserError(
                    f"{field} must have x's shape without its width, {tuple(tokens)}; "
                    f"got {tuple(value.shape)}"
                )
        if padding_mask is not None and padding_mask.dtype != torch.bool:
            raise UserError(
                f"padding_mask must be bool, True for padding; got {padding_mask.dtype}"
            )
        recorded = None if routing is None else routing.num_tokens
        if recorded is not None and recorded != tokens.numel():
            raise UserError(
                f"routing must be recorded from as many tokens as x has, {tokens.numel()}; "
                f"got {recorded}"
            )


def _rows(value_TX: Tensor, routing: Routing) -> Tensor:
    """What is to be dispatched: the tokens, or copies of those that experts chose."""
    return value_TX if routing.token_N is None else value_TX[routing.token_N]


def _tokens(y_ND: Tensor, routing: Routing, num_tokens: int) -> Tensor:
    """The sum of each token's rows, in float32 or wider and a fixed order."""
    if routing.token_N is None:
        return y_ND
    wide = torch.promote_types(y_ND.dtype, torch.float32)
    total_TD = y_ND.new_zeros(num_tokens, y_ND.shape[1], dtype=wide)
    # Unlike index_add, this adds in one order on a GPU too.
    return total_TD.index_put((routing.token_N,), y_ND.to(wide), accumulate=True).to(y_ND.dtype)


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of a model by their qualified name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


def set_loss_scale(model: nn.Module, scale: float | Tensor) -> None:
    """Set what multiplies attached balance losses until the next call.

    An attached loss must carry what the main loss carries. Where the main loss of a micro-batch is
    multiplied by a loss scale (fp16) and by the micro-batch's share of the step's tokens
    (accumulation), give the product here before the micro-batch's forward pass.

    Args:
        model: Any module.
        scale: Number or scalar tensor.
    """
    if isinstance(scale, Tensor):
        value = scale.detach()
    else:
        value = torch.tensor(scale, dtype=torch.float64, device="cpu")
    for moe in moe_layers(model).values():
        # A new tensor each time: graphs of earlier micro-batches may hold the old one.
        moe.loss_scale = value.clone()


class MoELoss:
    """Adds up the balance losses of layers made with ``losses="return"``; each is counted once.

    ``loss = criterion(model(x), y) + MoELoss()(model)``. Losses of a forward pass belong to the
    model until they are collected; those of a pass with ``return_routing=True`` belong to the
    caller, who gives the routings instead.
    """

    def __call__(self, source: nn.Module | list[Routing] | tuple[Routing, ...]) -> Tensor:
        """The sum of losses, coefficients included; 0 without any.

        Args:
            source: A model, or routings.

        Raises:
            ValueError: If the model's layers attach their losses themselves.
        """
        if isinstance(source, nn.Module):
            layers = moe_layers(source)
            attached = [name for name, moe in layers.items() if moe.losses == "attach"]
            if attached:
                raise UserError(
                    f"layer {attached[0]!r} attaches its balance losses to the graph already; "
                    "make it with MoE(..., losses='return') or leave MoELoss out"
                )
            losses = [loss for moe in layers.values() for loss in moe.collect_losses()]
        else:
            losses = [loss for routing in source for loss in routing.losses.values()]
        return torch.stack(losses).sum() if losses else torch.zeros(())
