"""The ``expertmesh`` command: its first word names the file beside this one that does the work."""

import importlib
import os
import sys
from collections.abc import Sequence

from expertmesh import __version__
from expertmesh.errors import UserError, nearest

COMMANDS = (
    "train",
    "launch",
    "generate",
    "chat",
    "eval",
    "report",
    "convert",
    "data",
    "doctor",
)
DEBUG = "EXPERTMESH_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    A command is a module ``expertmesh.cli.NAME`` with a line ``HELP`` and a function
    ``main(argv) -> int | None``; only that module is imported.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        The exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _let_waiting_threads_sleep()
    try:
        return _run_and_flush(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`expertmesh ... | head`); nobody is left to tell.
        _drop_output()
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        is_ours = isinstance(error, RuntimeError) and not _is_about_memory(error)
        if is_ours or os.environ.get(DEBUG) == "1":
            raise
        try:
            # What was said before the mistake stands before it, in a file or a pipe too.
            _flush()
        except OSError:
            _drop_output()
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2


def _let_waiting_threads_sleep() -> None:
    """Shorten the time that torch's threads spin before they sleep; to be called before its import.

    By default they spin for milliseconds. Once another program wants a core, that was seen to
    make training several times slower; with this it was not, and an idle machine is as fast.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _run_and_flush(words: list[str]) -> int:
    """Run a command, and meet a reader that is gone or a full disk here, not after the end."""
    try:
        status = _run(words)
    except SystemExit:
        _flush()
        raise
    _flush()
    return status


def _flush() -> None:
    # None where the program was started with its output closed.
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"
        raise


def _drop_output() -> None:
    """Let Python throw away at its end what could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"expertmesh {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise UserError(
            f"unknown command {name!r}{nearest(name, COMMANDS)}; commands: {', '.join(COMMANDS)}"
        )
    return int(importlib.import_module(f"expertmesh.cli.{name}").main(rest) or 0)


def _help() -> str:
    lines = ["usage: expertmesh COMMAND ...", "", "commands:"]
    for name in COMMANDS:
        module = importlib.import_module(f"expertmesh.cli.{name}")
        lines.append(f"  {name:<10}{module.HELP}")
    lines += ["", "`expertmesh COMMAND --help` explains one; `--version` prints the version."]
    return "\n".join(lines)


def _is_about_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says it of a CPU with no kind of error of its own."""
    text = str(error)
    is_torchs = isinstance(error, RuntimeError) and (
        "out of memory" in text or "DefaultCPUAllocator" in text
    )
    return is_torchs or isinstance(error, MemoryError)


def _sentence(error: Exception) -> str:
    """What went wrong, on one line where the error itself is one line."""
    if _is_about_memory(error):
        first = (str(error) or "no more can be had").splitlines()[0]
        return (
            f"memory ran out: {first}; set a smaller model (model.dim, model.num_layers, "
            "model.num_experts), train.micro_batch, train.batch or data.seq_len"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
