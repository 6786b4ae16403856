"""Where a program is started: on this machine, or on another one over ssh."""

import os
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

HERE = "localhost"

# After five intervals of silence the other side counts as gone. ssh takes the first value that it
# is given for an option, so what a user's own words say holds over these.
_SSH_OPTIONS = (
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=4",
)


class Place(ABC):
    """A machine as seen from this one."""

    name: str

    @property
    @abstractmethod
    def address(self) -> str:
        """What the other machines call it."""

    @abstractmethod
    def command(self, arguments: Sequence[str], folder: str) -> list[str]:
        """The words that start this very Python there.

        Args:
            arguments: Python's arguments.
            folder: Where it starts, an absolute path.
        """


class ThisMachine(Place):
    """The machine that ``expertmesh launch`` runs on."""

    name = HERE

    @property
    def address(self) -> str:
        return HERE

    def command(self, arguments: Sequence[str], folder: str) -> list[str]:
        shell = f"cd {shlex.quote(folder)} && exec " + shlex.join([sys.executable, *arguments])
        return ["/bin/sh", "-c", shell]


class OverSSH(Place):
    """A machine reached by ``ssh`` without a password.

    Args:
        name: What ssh calls it: an address, a name, or a ``Host`` of ssh's configuration.
        ssh: The words that start ssh, with options of the user's own.
    """

    def __init__(self, name: str, ssh: Sequence[str] = ("ssh",)) -> None:
        self.name = name
        self._ssh = [*ssh, *_SSH_OPTIONS, name]

    @cached_property
    def address(self) -> str:
        """The name or address behind an alias of ssh's configuration."""
        asked = subprocess.run(
            [*self._ssh[:-1], "-G", self.name],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        for line in asked.stdout.splitlines():
            key, _, value = line.partition(" ")
            if key == "hostname":
                return value
        return self.name

    def command(self, arguments: Sequence[str], folder: str) -> list[str]:
        words = [sys.executable, *arguments]
        # A checkout that is used without being installed is found the same way there.
        if path := os.environ.get("PYTHONPATH"):
            words = ["env", f"PYTHONPATH={path}", *words]
        # ssh joins its words with blanks and gives them to a shell.
        return [*self._ssh, f"cd {shlex.quote(folder)} && exec {shlex.join(words)}"]
