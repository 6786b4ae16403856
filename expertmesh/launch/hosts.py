"""The machines of a job, and the file that lists them."""

from dataclasses import dataclass
from pathlib import Path

from expertmesh.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine that takes part.

    Attributes:
        name: What ``ssh`` calls it.
        num_processes: Ranks that it runs.
    """

    name: str
    num_processes: int


def read_hostfile(path: Path, num_processes: int | None) -> list[Host]:
    """Read lines ``host [slots=N]``; what follows ``#`` is a comment.

    Args:
        path: The file.
        num_processes: Ranks of a host whose line has no ``slots``.

    Returns:
        At least one host, in the file's order; the first one is the meeting point of all.

    Raises:
        UserError: If there is no such file, or a line cannot be understood.
    """
    if not path.is_file():
        raise UserError(f"--hostfile must be a file with lines `host [slots=N]`, got {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path} cannot be read: {error}") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words:
            hosts.append(_host(words, f"{path}:{number}", num_processes))
    if not hosts:
        raise UserError(f"--hostfile must name at least one host, got {path} without any")
    names = [host.name for host in hosts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{path} must name each host once, got {', '.join(twice)} more than once; "
            "set slots=N to run N processes on a host"
        )
    return hosts


def _host(words: list[str], where: str, num_processes: int | None) -> Host:
    name, *options = words
    # ssh would take it for one of its own options.
    if name.startswith("-"):
        raise UserError(f"{where}: a host's name must not begin with '-', got {name!r}")
    for option in options:
        key, _, value = option.partition("=")
        if key != "slots" or not value.isdecimal() or int(value) < 1:
            raise UserError(
                f"{where}: expected `host [slots=N]` with N of at least 1, got {option!r}"
            )
        num_processes = int(value)
    if num_processes is None:
        raise UserError(
            f"{where}: how many processes {name} runs is not said; "
            "set slots=N there, or --nproc-per-node for all"
        )
    return Host(name=name, num_processes=num_processes)
