"""Times on the host, contenders in turns; ``layer_gpu.medians`` is the same on a GPU."""

import time
from collections.abc import Callable


def take_turns(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds by contender and round.

    A busy moment of the machine hits all contenders of a round.

    Args:
        steps: What is timed.
        rounds: Those that count.
        warm: Rounds before them.
        clock: Seconds; ``time.process_time`` for processor time.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(warm + rounds):
        for name, run in steps.items():
            start = clock()
            run()
            if number >= warm:
                times[name].append((clock() - start) * 1e3)
    return times
