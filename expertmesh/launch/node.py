"""One host of a running job, as seen from the launching machine."""

import json
import queue
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import IO, Any, TypeAlias

from expertmesh.launch.job import Job
from expertmesh.launch.keeper import REPORT
from expertmesh.launch.logs import Logs

# A rank that another one's end took along ends by an error of its own or is aborted by its
# communication library. These ends have their cause in the rank itself.
_OWN_END = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


@dataclass(frozen=True)
class Failure:
    """A rank that ended badly, or torchrun itself, or the connection to a host.

    Attributes:
        host: Where.
        rank: Its number in the job; None for torchrun and the connection.
        reason: How it ended.
        consequence: Whether another failure may be its cause.
        seconds: When, by the host's clock, in seconds since 1970.
    """

    host: str
    rank: int | None
    reason: str
    consequence: bool
    seconds: float

    def __str__(self) -> str:
        who = self.host if self.rank is None else f"rank {self.rank} on {self.host}"
        return f"{who} {self.reason}"


class Node:
    """Starts a host's keeper, and holds it.

    Args:
        job: What runs there.
        index: The host's place in the job.
        logs: Takes the output.
        events: Gets this object when the host has ended.
    """

    def __init__(
        self, job: Job, index: int, logs: Logs, events: "queue.SimpleQueue[Event]"
    ) -> None:
        self.name = job.places[index].name
        self._logs = logs
        self._events = events
        self._last_line = "it said nothing"
        self._fault: str | None = None
        self._asked_to_stop = False
        self._report: dict[str, Any] | None = None
        keeper = ["-u", "-m", "expertmesh.launch.keeper"]
        self._process = subprocess.Popen(
            job.places[index].command(keeper, job.folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # A Ctrl-C in the terminal is for this process alone, which passes on what follows.
            start_new_session=True,
        )
        self._say(job.order(index))
        threading.Thread(target=self._read, daemon=True).start()

    def stop(self) -> None:
        """Ask for an orderly end: ranks that train finish their step and save."""
        self._asked_to_stop = True
        self._say("stop")

    def kill(self) -> None:
        """Ask for an end at once."""
        self._asked_to_stop = True
        self._say("kill")

    def cut(self) -> None:
        """Give up a host that does not answer."""
        self._process.kill()

    def close(self) -> None:
        """Let go: a keeper that is still there ends its job."""
        try:
            _pipe(self._process.stdin).close()
        except OSError:
            return

    def failures(self) -> list[Failure]:
        """What went wrong on a host that has ended."""
        if self._report is None:
            return [self._lost()]
        failures = self._report["failures"]
        # torchrun ends the other ranks of its host by SIGTERM, and may count them too.
        caused = [each for each in failures if each["status"] != -signal.SIGTERM] or failures
        found = [
            Failure(
                self.name,
                each["rank"],
                _ending(each["status"]),
                consequence=-each["status"] not in _OWN_END,
                seconds=each["seconds"],
            )
            for each in caused
        ]
        status = self._report["status"]
        if found or status == 0 or self._asked_to_stop:
            return found
        consequence = -status not in _OWN_END
        reason = f"{_ending(status)} (torchrun): {self._fault or self._last_line}"
        return [Failure(self.name, None, reason, consequence, time.time())]

    def _lost(self) -> Failure:
        if self._asked_to_stop:
            reason = "did not answer when asked to stop; look for processes left there"
            return Failure(self.name, None, reason, consequence=True, seconds=time.time())
        said = self._fault or self._last_line
        reason = f"was lost (status {self._process.returncode}): {said}"
        return Failure(self.name, None, reason, consequence=False, seconds=0.0)

    def _say(self, line: str) -> None:
        try:
            _pipe(self._process.stdin).write(line + "\n")
            _pipe(self._process.stdin).flush()
        except (OSError, ValueError):
            # It has ended; what reads its output says so.
            return

    def _read(self) -> None:
        try:
            for line in _pipe(self._process.stdout):
                try:
                    self._take(line.rstrip("\n"))
                except (OSError, ValueError) as error:
                    # Nobody reads along any more, a disk is full, or a report was cut off. The job
                    # is to end, and can only if what it still says is taken from it.
                    self._fault = f"its output could not be taken: {error}"
                    self.close()
        finally:
            self._process.wait()
            self._events.put(self)

    def _take(self, line: str) -> None:
        text, mark, report = line.partition(REPORT)
        if mark:
            self._report = json.loads(report)
        if text or not mark:
            self._last_line = text or self._last_line
            self._logs.line(self.name, text)


Event: TypeAlias = Node | signal.Signals
"""What the supervising loop waits for: a host that has ended, or a signal."""


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
