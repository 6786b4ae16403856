"""The process that ranks of a pool are forked from: ``python -m expertmesh.testing.nursery FD``.

It imports torch once and stays a process of one thread, which is what makes forking it safe.
"""

import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Never

import torch
import torch.distributed as dist

from expertmesh.testing.protocol import Done, Failed, Hung, Request

# Imported here once rather than by every rank.
_COMMON = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
)
_STACK_SIGNAL = signal.SIGUSR1
# After a first failure the others may still be about to report the same, behind a busy disk too.
_GRACE_SECONDS = 5.0


@dataclass
class _Rank:
    """A forked rank, as the nursery sees it."""

    pid: int
    pipe: Connection
    stack: Path
    result: bytes | None = None
    failure: str | None = None

    @property
    def finished(self) -> bool:
        return self.result is not None or self.failure is not None

    def said_of_its_stack(self) -> str:
        try:
            return self.stack.read_text()
        except FileNotFoundError:
            return "the rank had not begun"


@dataclass
class _Call:
    """The ranks of one request, and who failed first."""

    ranks: list[_Rank] = field(default_factory=list)
    first_failure: int | None = None

    def listen(self, caller: Connection, timeout: float) -> bool:
        """Collect reports until all ranks have finished, one failed, or the time is up.

        Returns:
            False if the caller is gone.
        """
        deadline = time.monotonic() + timeout
        while pending := {rank.pipe: rank for rank in self.ranks if not rank.finished}:
            ready = wait([caller, *pending], timeout=max(0.0, deadline - time.monotonic()))
            if caller in ready:  # it never speaks during a call: this is its end
                return False
            if not ready:
                break
            heard = [pending[pipe] for pipe in ready]  # type: ignore[index]  # `wait` also takes sockets
            for rank in heard:
                self._hear(rank)
            self._note_first([rank for rank in heard if rank.failure is not None])
            if self.first_failure is not None:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        return True

    def _note_first(self, failed: list[_Rank]) -> None:
        """Of ranks whose failures were heard at once, one that died took the others along."""
        if failed and self.first_failure is None:
            self.first_failure = self.ranks.index(min(failed, key=lambda rank: rank.pid > 0))

    def _hear(self, rank: _Rank) -> None:
        try:
            kind, payload = pickle.loads(rank.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            _, status = os.waitpid(rank.pid, 0)
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            rank.pid = 0
            kind, payload = "failed", f"the process ended with {how}, before it returned"
        if kind == "done":
            rank.result = payload
            return
        rank.failure = payload

    def answer(self) -> Done | Failed | Hung:
        """What became of the call; ranks still at work are asked for their stack."""
        if self.first_failure is not None:
            failures = {i: r.failure for i, r in enumerate(self.ranks) if r.failure is not None}
            return Failed(self.first_failure, failures)
        unfinished = {i: rank for i, rank in enumerate(self.ranks) if not rank.finished}
        if unfinished:
            for rank in unfinished.values():
                os.kill(rank.pid, _STACK_SIGNAL)
            time.sleep(0.5)
            return Hung({i: rank.said_of_its_stack() for i, rank in unfinished.items()})
        return Done([rank.result for rank in self.ranks if rank.result is not None])

    def end(self) -> None:
        """Let finished ranks go and kill the others, by their pid."""
        for rank in self.ranks:
            rank.pipe.close()
            if rank.pid and not rank.finished:
                os.kill(rank.pid, signal.SIGKILL)
        for rank in self.ranks:
            if rank.pid:
                os.waitpid(rank.pid, 0)


def serve(caller: Connection) -> None:
    """Answer requests until the caller is gone."""
    for name in _COMMON:
        importlib.import_module(name)
    while True:
        try:
            request = caller.recv()
        except (EOFError, ConnectionError):
            return
        with tempfile.TemporaryDirectory(prefix="expertmesh-ranks-") as folder:
            answer = _carry_out(request, caller, Path(folder))
        if answer is None:
            return
        caller.send(answer)


def _carry_out(request: Request, caller: Connection, folder: Path) -> Done | Failed | Hung | None:
    try:
        sys.path[:] = request.path
        importlib.import_module(request.module)
    except BaseException:
        return Failed(0, {0: traceback.format_exc()})
    gc.collect()
    gc.freeze()  # the garbage collector of a rank would copy the pages it touches
    call = _Call()
    try:
        for index in range(request.world):
            call.ranks.append(_fork(index, request, caller, folder, call.ranks))
        return call.answer() if call.listen(caller, request.timeout) else None
    finally:
        call.end()


def _fork(
    index: int, request: Request, caller: Connection, folder: Path, earlier: list[_Rank]
) -> _Rank:
    ours, theirs = Pipe()
    stack = folder / f"stack_{index}"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        # A rank that kept these open would hide the end of the nursery from the others.
        for connection in (caller, ours, *(rank.pipe for rank in earlier)):
            connection.close()
        _live(index, request, theirs, folder, stack)
    theirs.close()
    return _Rank(pid, ours, stack)


def _live(index: int, request: Request, pipe: Connection, folder: Path, stack: Path) -> Never:
    """A rank's whole life; it ends when the nursery closes the pipe."""
    report: tuple[str, str | bytes]
    try:
        # Where the stacks of a rank that hangs are written; kept open until the end.
        trace = stack.open("w")
        faulthandler.register(_STACK_SIGNAL, file=trace, all_threads=True)
        report = ("done", pickle.dumps(_enter(index, request, folder)()))
    except BaseException:
        report = ("failed", traceback.format_exc())
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(pickle.dumps(report))
        # Others may still be talking to this rank: its sockets stay until all have reported.
        pipe.poll(None)
    finally:
        os._exit(0)


def _enter(index: int, request: Request, folder: Path) -> Callable[[], object]:
    """Become rank ``index`` of a process group; returns what to do as such."""
    rank, world = str(index), str(request.world)
    os.environ.clear()
    os.environ.update(request.environ)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    # Found by the host's name otherwise, which need not resolve.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_indextoname(1))
    os.chdir(request.folder)
    torch.set_num_threads(1)
    function, args = pickle.loads(request.call)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "rendezvous"), request.world),
        rank=index,
        world_size=request.world,
        # Longer than the pool's own, which tells more about who waits for whom.
        timeout=timedelta(seconds=request.timeout + 30),
    )
    return lambda: function(*args)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
    os._exit(0)  # nothing to clean up, and some extensions complain at length when they try
