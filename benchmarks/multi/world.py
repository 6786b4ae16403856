"""The processes of a run: what they tell each other, how they time, how long they may take."""

import gc
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.mesh import Mesh

T = TypeVar("T")
Step = Callable[[], object]
OUT_OF_MEMORY = "out of memory"


class World:
    """All processes, seen from one.

    Args:
        device: This process's.
        tiny: Whether sizes are those of a test.
    """

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        mesh = Mesh(device=device.type)
        self.device = device
        self.tiny = tiny
        self.rank, self.size = mesh.rank, mesh.world
        self._agreement = Agreement(mesh.everyone)
        self._deadline = 0.0

    def begin(self, seconds: float) -> None:
        """Give the cases to come so long."""
        self._deadline = time.monotonic() + seconds

    def has_time(self) -> bool:
        """Whether another case may begin; the same on all ranks."""
        return self.gather(time.monotonic() < self._deadline)[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's, by rank."""
        return self._agreement.gather(value)

    def attempt(self, case: Callable[[], T]) -> T | str:
        """Do what all ranks do; where one fails, the error's text in place of the result on all.

        The next case can begin then: what does not fit or is not supported fails alike everywhere.
        """
        result: T | None = None
        error = ""
        try:
            result = case()
        except Exception as caught:
            traceback.print_exc()
            error = _in_words(caught)
        errors = [text for text in self.gather(error) if text]
        self.free()
        return errors[0] if errors else result  # type: ignore[return-value]  # there is one

    def together(self, block: Callable[[], T]) -> T:
        """What a block gives; an error of one rank is raised on all, if none waits for it inside.

        A rank that alone runs out of memory would leave the others waiting for it at the next
        meeting.
        """
        with self._agreement.together():
            return block()

    def say(self, text: str) -> None:
        """Print once."""
        if self.rank == 0:
            print(text, flush=True)

    def free(self) -> None:
        """Give back what is not used; sharded modules are cycles, which only a collection frees."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def meet(self) -> None:
        """Let the ranks' devices wait for each other; the hosts go on where they can."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def median_ms(self, step: Step, rounds: int) -> float:
        """Milliseconds of a step that all ranks do together: the slowest rank's median.

        Ranks meet before each run; two more come first and are not counted.
        """
        spans = []
        for _ in range(rounds + 2):
            self.meet()
            start = self._now()
            step()
            spans.append((start, self._now()))
        self.synchronize()
        own = statistics.median(_between(*span) for span in spans[2:])
        return max(self.gather(own))

    def seconds(self, step: Step, rounds: int, warm: int) -> float:
        """Wall-clock seconds of a step, to its end on the device: the slowest rank's median.

        Steps that need no other rank may fail on one rank alone.
        """

        def timed() -> float:
            start = time.perf_counter()
            step()
            self.synchronize()
            return time.perf_counter() - start

        times = []
        for _ in range(warm + rounds):
            self.synchronize()
            self.meet()
            times.append(self.together(timed))
        return max(self.gather(statistics.median(times[warm:])))

    def host_waits(self, step: Step) -> int | None:
        """How often the host waits for the device in a step, at most; None without a device."""
        if self.device.type != "cuda":
            step()
            return None
        step()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
        for place, times in Counter(f"{w.filename}:{w.lineno}" for w in waits).items():
            self.say(f"    the host waits {times}x at {place}")
        return max(self.gather(len(waits)))

    def exchange_ms(self, step: Step, rounds: int, least_bytes: int) -> tuple[float, float]:
        """Milliseconds of a step's large exchanges, all together: the slowest rank's medians.

        Args:
            step: Forward and backward, say.
            rounds: Steps that the medians are over; two more come first and are not counted.
            least_bytes: What an exchange must send to count.

        Returns:
            As they come in the step, waiting for the other ranks included; and with ranks that
            meet before each.
        """

        def alone() -> None:
            pass

        waiting = self._exchanges(step, rounds, least_bytes, alone)
        return waiting, self._exchanges(step, rounds, least_bytes, self.meet)

    def _exchanges(
        self, step: Step, rounds: int, least_bytes: int, before: Callable[[], None]
    ) -> float:
        exchange = dist.all_to_all_single
        seen: list[list[tuple[Any, Any]]] = []

        def timed(output: Tensor, source: Tensor, *arguments: Any, **options: Any) -> Any:
            if source.nbytes < least_bytes:
                return exchange(output, source, *arguments, **options)
            before()
            start = self._now()
            work = exchange(output, source, *arguments, **options)
            seen[-1].append((start, self._now()))
            return work

        with mock.patch.object(dist, "all_to_all_single", timed):
            for _ in range(rounds + 2):
                seen.append([])
                self.meet()
                step()
        self.synchronize()
        own = statistics.median(sum(_between(*span) for span in spans) for spans in seen[2:])
        return max(self.gather(own))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _in_words(error: Exception) -> str:
    """One line for a table."""
    text = f"{type(error).__name__}: {error}"
    if torch.OutOfMemoryError.__name__ in text:  # said of another rank, it is a RuntimeError
        return OUT_OF_MEMORY
    return f"failed: {' '.join(text.split())[:300]}".replace("|", "/")


def _between(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return 1e3 * (stop - start)
    return float(start.elapsed_time(stop))
