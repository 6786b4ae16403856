"""What a layer reports about its routing.

A layer accumulates counters on its device; each counter says how it reduces over ranks, and every
statistic is derived from reduced counters, so that it means the same on every mesh. Recompute under
activation checkpointing counts nothing twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expertmesh.kernels.router import counts, router_count
from expertmesh.recompute import is_recompute
from expertmesh.routing import Routing

POSITION_BINS = 16
"""Bins of the relative position in a sequence over which drops are counted."""

COUNTERS = ("load", "choices", "dropped", "tokens", "entropy", "max_logit")
"""In the order in which the kernel takes them."""

DEAD_BELOW = 0.1
"""An expert with less than this part of its fair share counts as dead."""


@dataclass(frozen=True)
class Metric:
    """A counter and how it reduces over ranks.

    Attributes:
        value: Tensor of any shape, accumulated since the last reset.
        reduce: ``"sum"`` or ``"max"``.
    """

    value: Tensor
    reduce: Literal["sum", "max"]


class RoutingMeter:
    """Accumulates counters of one layer's routing.

    ``load`` ``(E,)``: choices per expert, those later dropped included; ``tokens``: padding left
    out; ``choices`` ``(16,)``: as many as in ``load``, and ``dropped`` ``(16,)``: by relative
    position in the sequence; ``entropy``: nats summed over tokens; ``max_logit``: the largest
    absolute router logit.

    Not a module and no buffers: counters must not be cast with the model, be part of its weights,
    or be overwritten by a wrapper that broadcasts buffers. They live where the routing lives.

    Args:
        num_experts: E.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._counters: dict[str, Tensor] = {}

    @torch.no_grad()
    def count(
        self,
        routing: Routing,
        num_tokens: int,
        padding_mask: Tensor | None,
        sequence_length: int | None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Add one forward pass; the repetition of one in backward adds nothing.

        Args:
            routing: The decision.
            num_tokens: T.
            padding_mask: bool ``(T,)``, True for padding, or None.
            sequence_length: Tokens in a sequence; without sequences all T are one.
            part: Which of how many equal parts of the sequences these tokens are.
        """
        if is_recompute():
            return
        counters = self._counters = self._counters_on(routing.load_E.device)
        asked_TK = _asked(routing)
        plain = padding_mask is None and part == (0, 1) and routing.token_N is None
        if plain and routing.logits_TE is not None and counts(routing.logits_TE):
            router_count(
                routing.logits_TE,
                asked_TK,
                routing.dropped_TK,
                routing.load_E,
                [counters[name] for name in COUNTERS],
                sequence_length or num_tokens,
            )
            return
        counters["load"] += routing.load_E
        bin_T = _position_bins(num_tokens, sequence_length, part, routing.load_E.device)
        if routing.token_N is not None:
            bin_T = bin_T[routing.token_N]
        asked_T = (asked_TK < routing.num_experts).sum(dim=1)
        counters["choices"].index_add_(0, bin_T, asked_T)
        if routing.dropped_TK is not None:
            counters["dropped"].index_add_(0, bin_T, routing.dropped_TK.sum(dim=1))
        counters["tokens"] += num_tokens if padding_mask is None else (~padding_mask).sum()
        if routing.logits_TE is not None and num_tokens > 0:
            self._count_logits(routing.logits_TE, padding_mask)

    def _count_logits(self, logits_TE: Tensor, padding_mask: Tensor | None) -> None:
        log_p_TE = logits_TE.float().log_softmax(dim=1)
        entropy_T = -(log_p_TE.exp() * log_p_TE).sum(dim=1)
        peak_T = logits_TE.float().abs().amax(dim=1)
        if padding_mask is not None:
            entropy_T = torch.where(padding_mask, 0.0, entropy_T)
            peak_T = torch.where(padding_mask, 0.0, peak_T)
        self._counters["entropy"] += entropy_T.sum()
        peak = self._counters["max_logit"]
        torch.maximum(peak, peak_T.amax(), out=peak)

    def read(self, *, reset: bool = True) -> dict[str, Metric]:
        """The counters since the last reset.

        Args:
            reset: Start again from zero.
        """
        counters = self._counters or self._zeros(torch.device("cpu"))
        metrics = {
            name: Metric(counter.clone(), "max" if name == "max_logit" else "sum")
            for name, counter in counters.items()
        }
        if reset:
            for counter in counters.values():
                counter.zero_()
        return metrics

    def set(self, values: Mapping[str, Sequence[int] | float], device: torch.device) -> None:
        """Count on from what another meter had counted.

        Args:
            values: Of each counter, as ``Metric.value.tolist()`` gives them.
            device: Where the routing lives.
        """
        self._counters = self._counters or self._zeros(device)
        for name, counter in self._counters.items():
            counter.copy_(torch.tensor(values[name], dtype=counter.dtype))

    def _counters_on(self, device: torch.device) -> dict[str, Tensor]:
        """The counters, which follow a layer that was moved to another device."""
        if not self._counters:
            return self._zeros(device)
        if self._counters["load"].device == device:
            return self._counters
        with torch.inference_mode(False):
            return {name: counter.to(device) for name, counter in self._counters.items()}

    @torch.inference_mode(False)  # what is made in inference mode could not be counted on with
    def _zeros(self, device: torch.device) -> dict[str, Tensor]:
        shapes = {
            "load": (self._num_experts,),
            "choices": (POSITION_BINS,),
            "dropped": (POSITION_BINS,),
            "tokens": (),
        }
        counters = {
            name: torch.zeros(shape, dtype=torch.int64, device=device)
            for name, shape in shapes.items()
        }
        for name in ("entropy", "max_logit"):
            counters[name] = torch.zeros((), device=device)
        return counters


def _asked(routing: Routing) -> Tensor:
    """Choices that asked for a slot: not those skipped by rule, nor padding's, which hold E."""
    if routing.dropped_TK is None:
        return routing.expert_TK
    return torch.where(routing.dropped_TK, routing.chosen_TK, routing.expert_TK)


def _position_bins(
    num_tokens: int, sequence_length: int | None, part: tuple[int, int], device: torch.device
) -> Tensor:
    length = max(sequence_length or num_tokens, 1)
    index, num_parts = part
    position_T = torch.arange(num_tokens, device=device) % length + index * length
    return position_T * POSITION_BINS // (num_parts * length)


@dataclass(frozen=True, kw_only=True)
class RoutingSummary:
    """Statistics of one layer's routing, from reduced counters.

    Attributes:
        load: Choices per expert.
        relative_load: Load over fair share (choices / E) per expert; 1.0 is fair.
        imbalance: Highest relative load (max/fair, MaxVio + 1).
        cv: Coefficient of variation of the load.
        dead: Experts with less than 10 % of their fair share.
        entropy: Mean entropy of the router's softmax, nats; log E is uniform.
        max_logit: Largest absolute router logit.
        dropped: Fraction of the choices in ``load`` that overflowed their expert's capacity.
        dropped_by_position: The same by relative position in the sequence, 16 bins.
    """

    load: list[int]
    relative_load: list[float]
    imbalance: float
    cv: float
    dead: int
    entropy: float
    max_logit: float
    dropped: float
    dropped_by_position: list[float]


def summarize(metrics: dict[str, Metric]) -> RoutingSummary:
    """Statistics from a layer's counters, after they were reduced over ranks.

    Without tokens every statistic is 0.
    """
    load_E = metrics["load"].value.double().cpu()
    choices = metrics["choices"].value.double().cpu()
    dropped = metrics["dropped"].value.double().cpu()
    tokens = float(metrics["tokens"].value)
    fair = float(load_E.mean())
    relative_E = load_E / fair if fair > 0 else torch.zeros_like(load_E)
    return RoutingSummary(
        load=[int(count) for count in load_E],
        relative_load=relative_E.tolist(),
        imbalance=float(relative_E.max()),
        cv=float(relative_E.std(correction=0)),
        dead=int((relative_E < DEAD_BELOW).sum()) if fair > 0 else 0,
        entropy=float(metrics["entropy"].value) / max(tokens, 1.0),
        max_logit=float(metrics["max_logit"].value),
        dropped=float(dropped.sum() / choices.sum().clamp_min(1)),
        dropped_by_position=(dropped / choices.clamp_min(1)).tolist(),
    )
