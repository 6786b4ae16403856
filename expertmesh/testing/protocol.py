"""What a rank pool and its nursery tell each other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One call on all ranks.

    Attributes:
        world: Number of ranks.
        module: Imported before ranks are forked.
        call: Pickled ``(function, args)``.
        timeout: Seconds.
        path: The caller's import path.
        folder: The caller's working directory.
        environ: The caller's environment.
    """

    world: int
    module: str
    call: bytes
    timeout: float
    path: list[str]
    folder: str
    environ: dict[str, str]


@dataclass(frozen=True)
class Done:
    """Pickled results by rank."""

    results: list[bytes]


@dataclass(frozen=True)
class Failed:
    """The first rank that failed, and tracebacks of all that did."""

    rank: int
    tracebacks: dict[int, str]


@dataclass(frozen=True)
class Hung:
    """Stacks of the ranks that had not finished in time."""

    stacks: dict[int, str]
