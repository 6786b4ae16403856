"""Calls of ``expertmesh launch`` on the head, and what they leave behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.hosts.network import LINK, Namespace, Network

ROOT = Path(__file__).parents[2]
PATIENCE = 400


def environment() -> dict[str, str]:
    """That of a rank; ranks find each other by the cable between the hosts."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}


def start(
    network: Network, folder: Path, *words: str, ssh: str | None = None
) -> "subprocess.Popen[str]":
    """``expertmesh launch`` with the host file and log folder of ``folder``.

    Args:
        network: The hosts.
        folder: Where the command runs.
        words: What follows its options.
        ssh: For ``--ssh``; None is the network's own.
    """
    options = ["--hostfile=hosts", "--ssh", ssh or network.ssh(), "--log-dir=logs", *words]
    return _on_head(network, folder, "expertmesh", "launch", *options)


def drive(
    network: Network, log_dir: Path, *program: str, patience: float = 45.0
) -> "subprocess.Popen[str]":
    """Any program on both hosts, two ranks on each; see ``driver``.

    Args:
        network: The hosts.
        log_dir: For the output of ranks.
        program: What torchrun starts.
        patience: As of ``Job``.
    """
    options = [network.ssh(), "a,b", str(log_dir), str(patience)]
    return _on_head(network, ROOT, "tests.hosts.driver", *options, *program)


def _on_head(network: Network, folder: Path, module: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        network.head.words(sys.executable, "-m", module, *words),
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(
    network: Network, folder: Path, *words: str, ssh: str | None = None
) -> tuple[int, str, str]:
    """As ``start``, to its end: exit status, output, errors."""
    return ended(start(network, folder, *words, ssh=ssh))


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait for the end: exit status, output, errors."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def ranks_on(host: Namespace) -> list[int]:
    """Process ids of what the job runs there: ranks, torchrun and its keeper."""
    found = []
    for pid in subprocess.check_output(["ip", "netns", "pids", host.name], text=True).split():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        # One that is ending has no words any more; sshd's sessions end a little after the others.
        if words and b"sshd" not in words:
            found.append(int(pid))
    return found


def wait_until(true: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    """Wait, and fail with ``what`` if it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def all_ended(network: Network) -> bool:
    """Whether nothing but sshd runs on the hosts."""
    return not ranks_on(network.a) and not ranks_on(network.b)
