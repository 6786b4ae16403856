"""Hosts made of network namespaces, on links that exist nowhere else.

``head`` is where jobs are launched from; ``a`` and ``b`` run ranks, each with its own sshd. Ranks
talk over ``fast0``, a cable between a and b alone; ssh comes over ``ssh0``, a cable from the head
to each of them. So the counters of ``fast0`` say what ranks of different hosts exchanged.

    head ssh0a ---- ssh0 a fast0 ---- fast0 b ssh0 ---- ssh0b head
"""

import os
import signal
import subprocess
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

PREFIX = "emtest"
LINK = "fast0"
PORT = 2222


def ip(*words: str) -> str:
    """``ip WORDS``; its output."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Namespace:
    """A host.

    Attributes:
        name: Of the namespace.
        address: On the link between hosts; empty for the head.
        control: On the link to the head; empty for the head.
    """

    name: str
    address: str = ""
    control: str = ""

    def ip(self, *words: str) -> str:
        """``ip WORDS`` there."""
        return ip("-n", self.name, *words)

    def words(self, *program: str) -> list[str]:
        """The words that start a program there, under the process id of `ip` itself."""
        return ["ip", "netns", "exec", self.name, *program]

    def sent(self) -> int:
        """Bytes that left this host for the other one, by the link's own counter."""
        counter = f"/sys/class/net/{LINK}/statistics/tx_bytes"
        return int(subprocess.check_output(self.words("cat", counter)))


class Network(AbstractContextManager["Network"]):
    """The three hosts. Namespaces, links, sshd and what they started end with the context.

    Args:
        folder: For keys, configuration and logs.
    """

    def __init__(self, folder: Path) -> None:
        owner = f"{PREFIX}{os.getpid()}"
        self.folder = folder
        self.head = Namespace(f"{owner}head")
        self.a = Namespace(f"{owner}a", "10.77.0.1", "10.77.1.1")
        self.b = Namespace(f"{owner}b", "10.77.0.2", "10.77.2.1")
        self._cleanup = ExitStack()
        self._servers = 0

    def __enter__(self) -> "Network":
        forget_dead_owners()
        try:
            self._lay_cables()
            self._make_keys()
            for host in (self.a, self.b):
                self.serve(host)
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()

    def serve(self, host: Namespace, port: int = PORT, settings: str = "") -> None:
        """Start an sshd.

        Args:
            host: Where it listens, on that host's own addresses only.
            port: On which port.
            settings: More lines of its configuration.
        """
        self._servers += 1
        stem = self.folder / f"sshd{self._servers}"
        stem.with_suffix(".conf").write_text(
            f"Port {port}\n"
            f"ListenAddress {host.address}\nListenAddress {host.control}\n"
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin prohibit-password\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\n{settings}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        with stem.with_suffix(".log").open("w") as log:
            words = ["/usr/sbin/sshd", "-D", "-e", "-f", str(stem.with_suffix(".conf"))]
            server = subprocess.Popen(host.words(*words), stdin=subprocess.DEVNULL, stderr=log)
        self._cleanup.callback(_end, server)
        _wait_for(stem.with_suffix(".log"), "Server listening on", server)

    def ssh(self, **aliases: str) -> str:
        """The words for ``--ssh``.

        Args:
            aliases: Host names to be understood, each with its lines of ssh's configuration.
        """
        lines = [f"Host {name}\n{text}" for name, text in aliases.items()]
        lines += [f"Host {name}\nHostName {getattr(self, name).address}" for name in ("a", "b")]
        config = self.folder / f"ssh_config_{'_'.join(aliases)}"
        config.write_text(
            "\n".join(lines) + f"\nHost *\nUser root\nPort {PORT}\nIdentitiesOnly yes\n"
            f"IdentityFile {self.folder}/user_key\nStrictHostKeyChecking yes\n"
            f"UserKnownHostsFile {self.folder}/known_hosts\nGlobalKnownHostsFile none\n"
        )
        return f"ssh -F {config}"

    def _lay_cables(self) -> None:
        for host in (self.head, self.a, self.b):
            ip("netns", "add", host.name)
            self._cleanup.callback(_remove, host.name)
            host.ip("link", "set", "lo", "up")
        _cable(self.a, LINK, self.b, LINK)
        for host, letter in ((self.a, "a"), (self.b, "b")):
            host.ip("address", "add", f"{host.address}/24", "dev", LINK)
            _cable(self.head, f"ssh0{letter}", host, "ssh0")
            host.ip("address", "add", f"{host.control}/24", "dev", "ssh0")
            near_end = host.control.removesuffix("1") + "2"
            self.head.ip("address", "add", f"{near_end}/24", "dev", f"ssh0{letter}")
            self.head.ip("route", "add", host.address, "via", host.control)

    def _make_keys(self) -> None:
        for name in ("host_key", "user_key"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(words, check=True)
        key = (self.folder / "host_key.pub").read_text()
        # Whatever the port, so that several sshd of a host share the line.
        (self.folder / "known_hosts").write_text(f"* {key}")


def _cable(one: Namespace, name: str, other: Namespace, other_name: str) -> None:
    ends = ["type", "veth", "peer", "name", other_name, "netns", other.name]
    one.ip("link", "add", name, *ends)
    one.ip("link", "set", name, "up")
    other.ip("link", "set", other_name, "up")


def _wait_for(log: Path, text: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 20
    while text not in log.read_text():
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _remove(name: str) -> None:
    """Kill what runs in a namespace, and remove it with its ends of cables."""
    for _ in range(20):
        pids = ip("netns", "pids", name).split()
        if not pids:
            break
        for pid in pids:
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
    ip("netns", "delete", name)


def forget_dead_owners() -> None:
    """Remove the namespaces of test runs that were killed."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        digits = name.removeprefix(PREFIX).rstrip("abdehv")
        if name.startswith(PREFIX) and digits.isdecimal() and not Path(f"/proc/{digits}").exists():
            _remove(name)
