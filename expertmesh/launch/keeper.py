"""What runs on each host: it starts torchrun, and sees that nothing of the job outlives it.

Standard input is the launching machine's hold on the job. Its first line is the order
(``Job.order``); a line ``stop`` asks for an orderly end, ``kill`` for an immediate one, and the end
of input, which also comes when the launching machine or the connection is gone, is a ``stop``.
The last line of standard output ends with ``REPORT`` and JSON, after what a rank may have said
without a line's end.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from expertmesh.launch.job import RANK_MARK
from expertmesh.launch.orphans import adopt_orphans, end_children, may_have_children

# Seconds that torchrun has for its own end once its last rank has ended.
_WITHOUT_RANKS = 10.0

# Two marks: a rank's line has one before its own words.
REPORT = f"{RANK_MARK}{RANK_MARK}report "


def main() -> int:
    """Keep one job.

    Returns:
        The exit status of torchrun.
    """
    # Without a buffer, so without the lock that a thread still reading would hold at the end.
    words = io.FileIO(0, closefd=False)
    order = json.loads(words.readline())
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="expertmesh-launch-") as folder:
        report = Path(folder) / "failures.json"
        process = _start(order, report, folder)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: process.terminate())
        threading.Thread(
            target=_obey, args=(words, process, order["patience"]), daemon=True
        ).start()
        status = _wait(process)
        left = end_children()
        failures = json.loads(report.read_text()) if report.exists() else []
    answer = {"status": status, "failures": failures, "left": left}
    print(REPORT + json.dumps(answer), flush=True)
    return status if status >= 0 else 1


def _start(order: dict[str, Any], report: Path, folder: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | order["environment"]
    if "OMP_NUM_THREADS" not in environment:
        # torchrun would set 1, and on a CPU leave the other cores idle.
        environment["OMP_NUM_THREADS"] = str(max(1, _num_cores() // order["num_processes"]))
    agent = [sys.executable, "-u", "-m", "expertmesh.launch.agent", str(report)]
    return subprocess.Popen(
        [*agent, f"--log-dir={folder}", *order["torchrun"]],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


def _wait(process: "subprocess.Popen[bytes]") -> int:
    """Until it ends; in pieces, between which Python runs the handlers of signals."""
    while True:
        try:
            return process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            continue


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _obey(words: io.FileIO, process: "subprocess.Popen[bytes]", patience: float) -> None:
    """Do what standard input says, until it ends.

    torchrun is asked once: asked again it ends its ranks before they have saved.
    """
    ending = threading.Thread(target=_end, args=(process, patience), daemon=True)
    for line in words:
        if line.strip() == b"kill":
            break
        if line.strip() == b"stop" and ending.ident is None:
            ending.start()
    else:
        if ending.ident is None:
            ending.start()
        ending.join()
    process.kill()


def _end(process: "subprocess.Popen[bytes]", patience: float) -> None:
    """Ask torchrun to end; kill it when its ranks have had their time, or when it has none.

    torchrun waits five minutes for other hosts once its own ranks have ended well, and does not
    hear signals then. A host that is gone never comes. One that is slow is not cut off by this:
    while its ranks work, so do those of the others, and a torchrun that was asked to end before
    its ranks have ended waits for nobody either.
    """
    process.terminate()
    now = time.monotonic()
    latest, alone = now + patience, now + _WITHOUT_RANKS
    while process.poll() is None and now < min(latest, alone):
        time.sleep(0.2)
        now = time.monotonic()
        if may_have_children(process.pid):
            alone = now + _WITHOUT_RANKS
    process.kill()


if __name__ == "__main__":
    sys.exit(main())
