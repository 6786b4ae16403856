"""Processes of a job whose parent has ended: adopted, and ended with the job.

A job's processes could also be told by a word in their environment, but a process that is about to
run another program has none for a moment, and one may clear it.
"""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

# From linux/prctl.h.
_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Have every descendant whose parent ends become a child of this process, where Linux runs."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children(*, patience: float = 10.0) -> int:
    """Kill this process's children, and theirs, which become its own by ``adopt_orphans``.

    Args:
        patience: Seconds after which a process that a driver holds is no longer waited for.

    Returns:
        How many were killed.
    """
    killed: set[int] = set()
    give_up = time.monotonic() + patience
    # A child's children appear here when it has ended, so one look is not enough.
    while _reap() and time.monotonic() < give_up:
        for child in _children(os.getpid()) - killed:
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
                killed.add(child)
        time.sleep(0.005)
    return len(killed)


def may_have_children(process: int) -> bool:
    """Whether a process has children, as far as this system tells: True where it does not."""
    return not Path("/proc/self/stat").exists() or bool(_children(process))


def _reap() -> bool:
    """Forget the children that have ended; whether there are others."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def _children(process: int) -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # The name in brackets may hold any character; state and parent follow it.
        with contextlib.suppress(OSError):
            if int(entry.read_bytes().rpartition(b")")[2].split()[1]) == process:
                found.add(int(entry.parent.name))
    return found
