"""The processes of a run: what they tell each other, how they time, how long they may take."""

import gc
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.mesh import Mesh

T = TypeVar("T")
Step = Callable[[], object]

_OTHER_KERNELS = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast")


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
            error = f"failed: {type(caught).__name__}: {str(caught)[:300]}"
        errors = [text for text in self.gather(error) if text]
        self.free()
        return errors[0] if errors else result  # type: ignore[return-value]  # there is one

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
        """Wall-clock seconds of a step, to its end on the device: the slowest rank's median."""
        times = []
        for number in range(warm + rounds):
            self.synchronize()
            self.meet()
            start = time.perf_counter()
            step()
            self.synchronize()
            if number >= warm:
                times.append(time.perf_counter() - start)
        return max(self.gather(statistics.median(times)))

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

    def exchange_ms(self, step: Step, rounds: int, largest: int) -> float | None:
        """Milliseconds that the largest exchanges of a step take on the device, all together.

        Kernels of sends and receives, which include waiting for the other rank; None without them.

        Args:
            step: Forward and backward, say.
            rounds: The median is over so many.
            largest: How many of a step's exchanges count.
        """
        if self.device.type != "cuda":
            step()
            return None
        from torch.profiler import ProfilerActivity, profile

        step()
        torch.cuda.synchronize()
        totals = []
        for _ in range(rounds):
            self.meet()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                step()
                torch.cuda.synchronize()
            spans = [_device_ms(event) for event in profiler.events() if _is_exchange(event.name)]
            totals.append(sum(sorted(spans)[-largest:]))
        own = statistics.median(totals)
        return max(self.gather(own)) or None

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return 1e3 * (stop - start)
    return float(start.elapsed_time(stop))


def _is_exchange(kernel: str) -> bool:
    return (
        kernel.startswith("nccl")
        and "Kernel" in kernel
        and not any(other in kernel for other in _OTHER_KERNELS)
    )


def _device_ms(event: Any) -> float:
    return float(event.device_time_total) / 1e3
