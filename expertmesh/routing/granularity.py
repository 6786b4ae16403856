"""One decision for many tokens: for a sequence, or for a task.

Routers of this library decide for each token. These two put any router whose tokens choose by what
they hold behind a coarser decision; the router itself does not know (sentence- and task-level
routing: Kudugunta et al., arXiv 2110.03742).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_deviation, check_ids
from expertmesh.routing.logits import wide_dtype
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import count_experts


class PerSequence(Router):
    """One decision per sequence: the wrapped router sees the mean of its valid tokens.

    All tokens of a sequence go to the same experts with the same weights. What the router counts it
    counts in sequences: its capacity, in which a sequence takes one slot and is kept or dropped
    whole, its noise, its losses and its selection bias. ``load_E`` and the metrics count tokens.

    Args:
        router: Any router whose tokens choose, by what they hold.

    Raises:
        ValueError: If the router ``looks_up`` something else, or takes capacity or losses by
            ``"sequence"``: there is one decision in each.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        _check_looks_at_x(self, router)
        for field, value in _with_scope(router):
            if value.scope == "sequence":
                raise UserError(
                    f"PerSequence makes one decision per sequence, so {field} cannot have "
                    "scope='sequence'; set scope='micro_batch' or a number of sequences"
                )
        self.router = router
        self.dim, self.num_experts, self.layer = router.dim, router.num_experts, router.layer

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``."""
        return "a sequence is routed by the mean of all its tokens"

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        return self.router.draws

    def reset_parameters(self, seed: int) -> None:
        """Those of the wrapped router."""
        self.router.reset_parameters(random.fold(seed, "router"))

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
        """See ``Router.forward``; ``token_ids`` are not looked at.

        Raises:
            ValueError: Without sequences, where ranks hold parts of one, or where experts chose.
        """
        length = self._length(len(x_TD), sequence_length)
        valid_BL = _valid(x_TD, padding_mask).view(-1, length)
        if key is not None:
            key = RandomKey(key.seed, key.token_index.reshape(-1, length)[:, 0])
        self.router.population = self.population
        by_sequence: Routing = self.router(
            _mean(x_TD, valid_BL),
            padding_mask=~valid_BL.any(dim=1),
            key=key,
            routing=None if routing is None else _first_rows(routing, valid_BL),
        )
        _check_tokens_chose(self, by_sequence)
        return _by_token(by_sequence, valid_BL)

    def _length(self, num_tokens: int, sequence_length: int | None) -> int:
        if sequence_length is None:
            raise UserError(
                "PerSequence needs the length of a sequence: give the layer an input of shape "
                "(batch, sequence, width), or the router sequence_length"
            )
        if self.population.ranks_per_sequence > 1:
            raise UserError(
                f"PerSequence needs whole sequences on a rank, but each lies on "
                f"{self.population.ranks_per_sequence}; set cp=1 and tp=1"
            )
        length = max(sequence_length, 1)
        if num_tokens % length:
            raise UserError(
                f"the number of tokens must be a multiple of sequence_length={length}, "
                f"got {num_tokens}"
            )
        return length


class PerTask(Router):
    """One decision per task: the wrapped router sees a learned vector of each token's task.

    The layer's ``token_ids`` are task ids here, for example languages. The content of a token plays
    no part, so nothing leaks and a task's experts can be cut out of the model for serving. Capacity
    and losses count tokens, as without the wrapper: a task counts by its tokens.

    Args:
        router: Any router whose tokens choose, by what they hold and not by chance: what is drawn
            for each token would part the tokens of a task.
        num_tasks: Task ids are from 0 to ``num_tasks - 1``.
        init_std: Standard deviation of the initial task vectors.
        seed: Of the initial task vectors; None draws one from torch's generator.

    Raises:
        ValueError: If the router ``draws`` or ``looks_up`` something, or a number is out of range.
    """

    def __init__(
        self,
        router: Router,
        num_tasks: int,
        *,
        init_std: float = 1.0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise UserError(f"num_tasks must be at least 1, got {num_tasks}")
        _check_looks_at_x(self, router)
        check_deviation("init_std", init_std)
        if router.draws is not None:
            raise UserError(
                "PerTask needs a router without chance, which would part the tokens of a task; in "
                f"{type(router).__name__} {router.draws}"
            )
        self.router = router
        self.dim, self.num_experts, self.layer = router.dim, router.num_experts, router.layer
        self.num_tasks, self.init_std = num_tasks, init_std
        self.task_GD = nn.Parameter(torch.empty(num_tasks, self.dim, device=device, dtype=dtype))
        if not self.task_GD.is_meta:
            self._draw(random.fresh_seed() if seed is None else seed)

    @property
    def looks_up(self) -> str | None:
        """See ``Router.looks_up``."""
        return "a vector is looked up by the task"

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``; only the wrapped router's capacity can."""
        return self.router.leaks

    def reset_parameters(self, seed: int) -> None:
        """Draw the task vectors and the wrapped router's parameters."""
        self._draw(seed)
        self.router.reset_parameters(random.fold(seed, "router"))

    def _draw(self, seed: int) -> None:
        random.fill_normal_(self.task_GD, self.init_std, random.fold(seed, "tasks"))

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
        """See ``Router.forward``; of ``x_TD`` only the number of tokens is looked at.

        Raises:
            ValueError: Without task ids, for ids that are no integers or not in the table, or where
                experts chose.
        """
        task_T = self._tasks(token_ids, padding_mask)
        self.router.population = self.population
        decided: Routing = self.router(
            self.task_GD[task_T],
            padding_mask=padding_mask,
            sequence_length=sequence_length,
            key=key,
            routing=routing,
        )
        _check_tokens_chose(self, decided)
        return decided

    def _tasks(self, token_ids: Tensor | None, padding_mask: Tensor | None) -> Tensor:
        if token_ids is None:
            raise UserError("PerTask needs the task of each token; give the layer token_ids")
        check_ids(token_ids)
        if padding_mask is not None:
            token_ids = torch.where(padding_mask, 0, token_ids)
        # On the CPU only: elsewhere the check would wait for the device.
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling() and len(token_ids):
            low, high = (int(bound) for bound in torch.aminmax(token_ids))
            if low < 0 or high >= self.num_tasks:
                raise UserError(
                    f"task ids (token_ids) must be between 0 and {self.num_tasks - 1}, got "
                    f"{low} to {high}; raise num_tasks"
                )
        return token_ids


def _check_looks_at_x(wrapper: Router, router: Router) -> None:
    """Refuse routers to which one vector in place of many tokens means nothing."""
    if router.looks_up is not None:
        name = type(wrapper).__name__
        raise UserError(
            f"{name} needs a router that decides by what tokens hold; in {type(router).__name__} "
            f"{router.looks_up}; use it without {name}"
        )


def _check_tokens_chose(wrapper: "PerSequence | PerTask", routing: Routing) -> None:
    if routing.token_N is not None:
        raise UserError(
            f"{type(wrapper).__name__} needs a router whose tokens choose; in "
            f"{type(wrapper.router).__name__} experts do"
        )


def _with_scope(router: Router) -> list[tuple[str, Any]]:
    """A router's options that are taken over a scope."""
    capacity = getattr(router, "capacity", None)
    options = [] if capacity is None else [("capacity", capacity)]
    options += [(f"the {loss.name} loss", loss) for loss in getattr(router, "losses", ())]
    return [(field, option) for field, option in options if hasattr(option, "scope")]


def _valid(x_TD: Tensor, padding_mask: Tensor | None) -> Tensor:
    if padding_mask is None:
        return torch.ones(len(x_TD), dtype=torch.bool, device=x_TD.device)
    return ~padding_mask


def _mean(x_TD: Tensor, valid_BL: Tensor) -> Tensor:
    """Mean of each sequence's valid tokens, in float32 or wider; zeros where there are none."""
    x_BLD = x_TD.to(wide_dtype(x_TD)).view(*valid_BL.shape, x_TD.shape[1])
    total_BD = torch.where(valid_BL[:, :, None], x_BLD, 0.0).sum(dim=1)
    return total_BD / valid_BL.sum(dim=1, keepdim=True).clamp_min(1)


def _first_rows(routing: Routing, valid_BL: Tensor) -> Routing:
    """A recorded routing's row of each sequence's first valid token: what ``_by_token`` spread."""
    first_B = valid_BL.to(torch.int8).argmax(dim=1)
    most = routing.most_per_expert
    row_B = torch.arange(len(valid_BL), device=first_B.device) * valid_BL.shape[1] + first_B
    return dataclasses.replace(
        routing,
        expert_TK=routing.expert_TK[row_B],
        weight_TK=routing.weight_TK[row_B],
        chosen_TK=routing.chosen_TK[row_B],
        dropped_TK=None if routing.dropped_TK is None else routing.dropped_TK[row_B],
        logits_TE=None,
        most_per_expert=None if most is None else most // valid_BL.shape[1],
    )


def _by_token(routing: Routing, valid_BL: Tensor) -> Routing:
    """Each sequence's decision, for each of its valid tokens."""
    length, num_experts = valid_BL.shape[1], routing.num_experts
    valid_T1 = valid_BL.reshape(-1, 1)

    def tokens(value_BX: Tensor) -> Tensor:
        return value_BX.repeat_interleave(length, dim=0)

    expert_TK = torch.where(valid_T1, tokens(routing.expert_TK), num_experts)
    chosen_TK = torch.where(valid_T1, tokens(routing.chosen_TK), num_experts)
    asked_TK, dropped_TK = expert_TK, None
    if routing.dropped_TK is not None:
        dropped_TK = tokens(routing.dropped_TK) & valid_T1
        asked_TK = torch.where(dropped_TK, chosen_TK, expert_TK)
    most = routing.most_per_expert
    return Routing(
        num_experts=num_experts,
        expert_TK=expert_TK,
        weight_TK=torch.where(valid_T1, tokens(routing.weight_TK), 0.0),
        chosen_TK=chosen_TK,
        load_E=count_experts(asked_TK, num_experts),
        dropped_TK=dropped_TK,
        logits_TE=None if routing.logits_TE is None else tokens(routing.logits_TE),
        losses=routing.losses,
        most_per_expert=None if most is None else most * length,
    )
