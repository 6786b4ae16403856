"""Hosts that are programs on this machine."""

import sys
from collections.abc import Sequence

from expertmesh.launch.hosts import Host
from expertmesh.launch.job import Job, Rendezvous
from expertmesh.launch.place import Place


class FakePlace(Place):
    """Runs a Python source in place of what it is asked to run."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source

    @property
    def address(self) -> str:
        return f"{self.name}.example"

    def command(self, arguments: Sequence[str], folder: str) -> list[str]:
        return [sys.executable, "-u", "-c", self.source, *arguments]


def job(*places: Place, num_processes: int = 2, **options: object) -> Job:
    """A job on places, with words that are easily known again."""
    given = {
        "program": ("-m", "expertmesh", "train", "run.toml"),
        "hosts": tuple(Host(name=place.name, num_processes=num_processes) for place in places),
        "places": places,
        "folder": "/",
        "rendezvous": Rendezvous(port=4321, id="theid"),
        "patience": 0.2,
    }
    return Job(**(given | options))
