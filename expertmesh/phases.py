"""Milliseconds of each step of a layer: route, dispatch, experts, combine, shared.

Timing is put on from outside for as long as it is wanted; the layer knows nothing of it, and pays
nothing when it is off.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.dispatch import Dispatched, Dispatcher
from expertmesh.layer import MoE, moe_layers
from expertmesh.routing import Routing

Mark = float | torch.cuda.Event
"""A moment: host seconds, or an event in the stream of a CUDA device."""


class PhaseTimes:
    """Forward time of each phase of each layer, in milliseconds."""

    def __init__(self) -> None:
        self._spans: dict[str, dict[str, list[tuple[Mark, Mark]]]] = defaultdict(
            lambda: defaultdict(list)
        )

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Layer name to phase to the mean over forward passes; waits for the device once."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {
            layer: {
                phase: sum(_length(*span) for span in spans) / len(spans)
                for phase, spans in phases.items()
            }
            for layer, phases in self._spans.items()
        }

    def add(self, layer: str, phase: str, start: Mark, stop: Mark) -> None:
        """Keep one measured span."""
        self._spans[layer][phase].append((start, stop))


@contextmanager
def time_phases(model: nn.Module) -> Iterator[PhaseTimes]:
    """Time the phases of every MoE layer of a model while the context is open.

    Args:
        model: Any module. Forward passes only are timed, recomputed ones included.

    Example:
        >>> with time_phases(model) as times:
        ...     model(x)
        >>> times.milliseconds()["blocks.1.moe"]["experts"]
    """
    times = PhaseTimes()
    with ExitStack() as stack:
        for name, moe in moe_layers(model).items():
            _watch(name, moe, times, stack)
        yield times


def _watch(name: str, moe: MoE, times: PhaseTimes, stack: ExitStack) -> None:
    for phase, module in (("route", moe.router), ("experts", moe.experts), ("shared", moe.shared)):
        if module is not None:
            _watch_module(name, phase, module, times, stack)
    plain = moe.dispatcher
    moe.dispatcher = _TimedDispatcher(plain, name, times)
    stack.callback(setattr, moe, "dispatcher", plain)


def _watch_module(
    name: str, phase: str, module: nn.Module, times: PhaseTimes, stack: ExitStack
) -> None:
    starts: list[Mark] = []

    def begin(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        starts.append(_now(inputs[0].device))

    def end(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        times.add(name, phase, starts.pop(), _now(inputs[0].device))

    for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end)):
        stack.callback(handle.remove)


class _TimedDispatcher(Dispatcher):
    """Another dispatcher, with its two ways timed."""

    def __init__(self, inner: Dispatcher, name: str, times: PhaseTimes) -> None:
        self._inner, self._name, self._times = inner, name, times

    def dispatch(self, x_TD: Tensor, routing: Routing, draw_T: Tensor | None = None) -> Dispatched:
        return self._timed(
            "dispatch", x_TD.device, lambda: self._inner.dispatch(x_TD, routing, draw_T)
        )

    def combine(self, y_RD: Tensor, context: Any) -> Tensor:
        return self._timed("combine", y_RD.device, lambda: self._inner.combine(y_RD, context))

    def _timed(self, phase: str, device: torch.device, run: Callable[[], Any]) -> Any:
        start = _now(device)
        result = run()
        self._times.add(self._name, phase, start, _now(device))
        return result


def _now(device: torch.device) -> Mark:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _length(start: Mark, stop: Mark) -> float:
    if isinstance(start, float):
        assert isinstance(stop, float)
        return 1e3 * (stop - start)
    assert not isinstance(stop, float)
    return float(start.elapsed_time(stop))
