"""Run a function on several processes that talk over gloo, for tests.

``run_on_ranks(4, function, 1.5)`` calls ``function(1.5)`` on four ranks of one process group and
returns their four results. A first call waits about three seconds for one process, the nursery,
that imports torch; every call then forks its ranks from it. A rank is thus a fresh process without
memory of earlier calls, ready in a tenth of a second, and shares torch's memory with the others.
"""

import atexit
import contextlib
import functools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from expertmesh.errors import UserError
from expertmesh.testing.protocol import Done, Failed, Hung, Request

R = TypeVar("R")

# Beyond a call's own timeout: imports in the nursery, reading stacks, ending ranks.
_GRACE_SECONDS = 60.0


class RankError(AssertionError):
    """A rank raised, or died.

    Attributes:
        rank: The first that did; after it the others may have failed only because it was gone.
        tracebacks: Text by rank, of all that said something before they were ended.
    """

    def __init__(self, rank: int, world: int, tracebacks: dict[int, str]) -> None:
        others = sorted(set(tracebacks) - {rank})
        also = f"; so did {others}, in their own words below" if others else ""
        text = "\n".join(f"--- rank {r} ---\n{tracebacks[r]}" for r in [rank, *others])
        super().__init__(f"rank {rank} of {world} failed{also}\n{text}")
        self.rank = rank
        self.tracebacks = tracebacks


class RankTimeout(AssertionError):
    """Ranks did not finish in time.

    Attributes:
        ranks: Those that had not.
        stacks: What each of them was doing, by rank.
    """

    def __init__(self, world: int, seconds: float, stacks: dict[int, str]) -> None:
        text = "\n".join(f"--- rank {rank} ---\n{stack}" for rank, stack in stacks.items())
        super().__init__(
            f"ranks {sorted(stacks)} of {world} had not finished after {seconds:g} s\n{text}"
        )
        self.ranks = sorted(stacks)
        self.stacks = stacks


class RankPool:
    """A nursery that gives ranks, kept between calls. Needs ``os.fork``.

    Use as a context, or call ``close``. It ends by itself when this process does.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def run(
        self, world: int, function: Callable[..., R], *args: Any, timeout: float = 60.0
    ) -> list[R]:
        """``function(*args)`` on every rank; see ``run_on_ranks``."""
        if world < 1:
            raise UserError(f"world must be at least 1, got {world}; set world = 1")
        request = Request(
            world=world,
            module=_module(function),
            call=pickle.dumps((function, args)),
            timeout=timeout,
            path=[entry or os.getcwd() for entry in sys.path],
            folder=os.getcwd(),
            environ=dict(os.environ),
        )
        with self._lock, _turn(world):
            answer = self._ask(request)
        if isinstance(answer, Failed):
            raise RankError(answer.rank, world, answer.tracebacks)
        if isinstance(answer, Hung):
            raise RankTimeout(world, timeout, answer.stacks)
        return [pickle.loads(result) for result in answer.results]

    def close(self) -> None:
        """End the nursery and with it every rank; the next call starts another."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()  # the nursery reads this as its end
        if process is not None:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _ask(self, request: Request) -> Done | Failed | Hung:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._start()
        assert self._connection is not None
        answer: Done | Failed | Hung
        try:
            self._connection.send(request)
            if not self._connection.poll(request.timeout + _GRACE_SECONDS):
                raise TimeoutError(
                    f"no answer {_GRACE_SECONDS:g} s after the ranks' own {request.timeout:g} s; "
                    f"does {request.module} do long work when it is imported?"
                )
            answer = self._connection.recv()
        except BaseException as error:
            # Also Ctrl-C: ranks of an abandoned call must not live on.
            self.close()
            if isinstance(error, EOFError | ConnectionError):
                raise RuntimeError("the process that starts ranks ended; see its output") from error
            raise
        return answer

    def _start(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "expertmesh.testing.nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_quiet_environment(),
                # Ctrl-C is for us; the nursery hears of it when the connection closes.
                start_new_session=True,
            )
        self._connection = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def run_on_ranks(
    world: int, function: Callable[..., R], *args: Any, timeout: float = 60.0
) -> list[R]:
    """Call a function on ``world`` ranks of one gloo process group.

    Ranks are processes of one thread each, with this process's working directory, environment and
    import path, and ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` as under
    torchrun. Torch's random state is the same on all. They talk over the loopback device.

    Workers of pytest-xdist take turns with more than two ranks, so that processes do not outnumber
    cores by far; waiting for one's turn is not part of the timeout.

    Args:
        world: Number of ranks.
        function: Importable by name: defined at the top of a module that is not the main script.
        *args: Picklable; the same for all ranks, which tell themselves apart by
            ``torch.distributed.get_rank()``.
        timeout: Seconds until ranks that have not finished are ended.

    Returns:
        What ``function`` returned, by rank; picklable.

    Raises:
        RankError: If a rank raised or died; with the traceback of each that raised.
        RankTimeout: If the time was up; with what each unfinished rank was doing.
        UserError: If the function cannot be imported by name.
    """
    return _shared_pool().run(world, function, *args, timeout=timeout)


@functools.cache
def _shared_pool() -> RankPool:
    pool = RankPool()
    atexit.register(pool.close)
    return pool


def _module(function: Callable[..., Any]) -> str:
    """Where the nursery finds the function."""
    name = getattr(function, "__qualname__", "")
    module = getattr(function, "__module__", "__main__")
    if module == "__main__" or "<" in name or not name:
        raise UserError(
            f"function must be importable by name, got {name or function!r} of {module}; "
            "define it at the top of a module that is not the main script"
        )
    return module


def _quiet_environment() -> dict[str, str]:
    """The nursery's environment: it must stay a process of one thread to fork safely."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {**os.environ, **one, "PYTHONPATH": path}


@contextlib.contextmanager
def _turn(world: int) -> Iterator[None]:
    """Among pytest-xdist's workers, let one at a time use more than two ranks."""
    if "PYTEST_XDIST_WORKER" not in os.environ or world <= 2:
        yield
        return
    import fcntl  # where there is no fork there is no such module either

    # This file serves as the lock: nothing is left behind, and the system frees it for the dead.
    with Path(__file__).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
