"""A run's counters between log lines: speed, memory, and what the MoE layers report."""

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expertmesh.layer import moe_layers
from expertmesh.metrics import Metric, RoutingSummary, summarize

if TYPE_CHECKING:
    from expertmesh.parallel.agreement import Agreement
    from expertmesh.parallel.mesh import Mesh


def memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: the accelerator's allocations, or on the CPU the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Clock:
    """Seconds spent in training, without evaluation and saving.

    Args:
        seconds: Already spent, by the run that this one continues.
        tokens: Already seen.
    """

    def __init__(self, seconds: float = 0.0, tokens: int = 0) -> None:
        self.seconds = seconds
        self.tokens = tokens
        self._since = (seconds, tokens)
        self._started = time.perf_counter()

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def stop(self, tokens: int) -> None:
        """It is done, with so many tokens."""
        self.seconds += time.perf_counter() - self._started
        self.tokens += tokens

    def tokens_per_second(self) -> float:
        """Since the last call."""
        seconds, tokens = self._since
        self._since = (self.seconds, self.tokens)
        return (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)


def routing_summaries(
    model: nn.Module, mesh: "Mesh | None" = None, ranks: "Agreement | None" = None
) -> dict[str, RoutingSummary]:
    """What each MoE layer counted since the last call, by the layer's name.

    Args:
        model: What this rank has of it.
        mesh: What it was laid out over; then every rank has the sums over all ranks.
        ranks: All ranks of the mesh.
    """
    counters = _counters(model, mesh, ranks)
    return {name: summarize(metrics) for name, metrics in counters.items()}


def routing_state(
    model: nn.Module,
    device: torch.device,
    mesh: "Mesh | None" = None,
    ranks: "Agreement | None" = None,
) -> dict[str, dict[str, Any]]:
    """What each MoE layer counted since it was last read, as JSON; the layers count on.

    All sums then lie with one rank, here as in a run that continues from them: so both round alike.

    Args:
        model: What this rank has of it.
        device: Where its layers compute.
        mesh: What it was laid out over.
        ranks: All ranks of the mesh.
    """
    counters = _counters(model, mesh, ranks)
    state = {
        name: {key: metric.value.tolist() for key, metric in metrics.items()}
        for name, metrics in counters.items()
    }
    set_routing_state(model, state, device, mesh)
    return state


def set_routing_state(
    model: nn.Module,
    state: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    mesh: "Mesh | None" = None,
) -> None:
    """Let layers that have counted nothing count on from what ``routing_state`` gave on any mesh.

    Args:
        model: What this rank has of it.
        state: By the layers' names; those without any start at zero.
        device: Where the layers compute.
        mesh: What the model was laid out over; the first rank of each stage takes the sums.
    """
    if mesh is not None and mesh.stage.index != 0:
        return
    for name, moe in moe_layers(model).items():
        if name in state:
            moe.meter.set(state[name], device)


def _counters(
    model: nn.Module, mesh: "Mesh | None", ranks: "Agreement | None"
) -> dict[str, dict[str, Metric]]:
    """The layers' counters, which start again from zero; on a mesh the sums over all ranks."""
    if mesh is None or ranks is None:
        return {name: moe.metrics(reset=True) for name, moe in moe_layers(model).items()}
    from expertmesh.parallel.reports import read_metrics

    return read_metrics(model, mesh, ranks)


def forget_routing(model: nn.Module) -> None:
    """Drop what the layers counted: after evaluation, whose tokens are not training's."""
    for moe in moe_layers(model).values():
        moe.metrics(reset=True)


def layer_entries(summaries: dict[str, RoutingSummary]) -> dict[str, dict[str, Any]]:
    """The layers of one line of ``routing.jsonl``."""
    return {
        name: {
            "load": summary.load,
            "dropped": summary.dropped,
            "dropped_by_position": summary.dropped_by_position,
            "entropy": summary.entropy,
            "max_logit": summary.max_logit,
        }
        for name, summary in summaries.items()
    }


def overall(summaries: dict[str, RoutingSummary]) -> dict[str, float]:
    """The worst layer's imbalance, and the fraction of choices dropped over all layers."""
    if not summaries:
        return {}
    choices = [sum(summary.load) for summary in summaries.values()]
    dropped = [summary.dropped * n for summary, n in zip(summaries.values(), choices, strict=True)]
    return {
        "imbalance": max(summary.imbalance for summary in summaries.values()),
        "dropped": sum(dropped) / max(sum(choices), 1),
    }
