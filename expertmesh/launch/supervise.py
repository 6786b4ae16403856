"""What the launching machine does while a job runs: wait, and stop all when one host fails."""

import math
import queue
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from expertmesh.launch.job import Job
from expertmesh.launch.logs import Logs
from expertmesh.launch.node import Event, Failure, Node

# When one rank dies, the others' collectives fail at once. Their hosts' reports are waited for,
# because the first report need not be that of the first failure.
_SETTLE_SECONDS = 5.0
_BEYOND_PATIENCE_SECONDS = 30.0
# Python runs a signal's handler between instructions of the main thread. One that comes just before
# a wait begins, or to another thread, is therefore heard at its end, which must not be far.
_HEARING_SECONDS = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        failures: The first is the likeliest cause of the others; none if all went well.
        stopped_by: The signal that asked for an end, or None.
    """

    failures: tuple[Failure, ...]
    stopped_by: signal.Signals | None


def run_job(job: Job, logs: Logs) -> Outcome:
    """Start a job on its hosts and stay with it to its end.

    SIGINT, SIGTERM and SIGHUP ask all hosts to stop: ranks that train finish their step and save.
    A second signal kills, unless it is SIGHUP: a terminal that closes may send two. Where SIGHUP is
    ignored, as under ``nohup``, it stays so. If this process is killed itself, its hosts notice,
    and stop.

    Args:
        job: What to start.
        logs: Takes the output.
    """
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    nodes: list[Node] = []
    with _signals_to(events):
        try:
            for index in range(len(job.places)):
                nodes.append(Node(job, index, logs, events))
            stopped_by = _Watch(nodes, events, job.patience).to_the_end()
        finally:
            for node in nodes:
                node.close()
    failures = [failure for node in nodes for failure in node.failures()]
    failures.sort(key=lambda failure: (failure.consequence, failure.seconds))
    return Outcome(tuple(failures), stopped_by)


class _Watch:
    """Waits for all hosts, harder and harder once one of them has failed or a signal came."""

    def __init__(
        self, nodes: Sequence[Node], events: "queue.SimpleQueue[Event]", patience: float
    ) -> None:
        self._running = set(nodes)
        self._events = events
        self._patience = patience
        self._stopped_by: signal.Signals | None = None
        self._stopping = False
        self._deadline: float | None = None

    def to_the_end(self) -> signal.Signals | None:
        """Return when no host runs any more: the signal that asked for it, or None."""
        while self._running:
            event = self._next()
            if event is None:
                self._cut() if self._stopping else self._stop()
            elif isinstance(event, signal.Signals):
                self._heed(event)
            else:
                self._running.discard(event)
                if self._deadline is None and event.failures():
                    self._wait(_SETTLE_SECONDS)
        return self._stopped_by

    def _heed(self, number: signal.Signals) -> None:
        if self._stopped_by is None:
            self._stop()
        elif number != signal.SIGHUP:
            self._kill()
        else:
            return
        self._stopped_by = number

    def _next(self) -> Event | None:
        """What happens next; None if nothing does before the deadline."""
        while True:
            left = math.inf if self._deadline is None else self._deadline - time.monotonic()
            try:
                return self._events.get(timeout=max(0.0, min(left, _HEARING_SECONDS)))
            except queue.Empty:
                if left <= _HEARING_SECONDS:
                    return None

    def _wait(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds

    def _stop(self) -> None:
        self._stopping = True
        for node in self._running:
            node.stop()
        self._wait(self._patience + _BEYOND_PATIENCE_SECONDS)

    def _kill(self) -> None:
        for node in self._running:
            node.kill()
        self._wait(_BEYOND_PATIENCE_SECONDS)

    def _cut(self) -> None:
        for node in self._running:
            node.cut()
        self._wait(_BEYOND_PATIENCE_SECONDS)


@contextmanager
def _signals_to(events: "queue.SimpleQueue[Event]") -> Iterator[None]:
    """Turn signals into events. Handlers exist in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda got, _: events.put(signal.Signals(got)))
        for number in _SIGNALS
        if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
