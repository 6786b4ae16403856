"""Output of all ranks: shown with host and rank before each line, and kept in a file per rank."""

import re
import threading
from pathlib import Path
from typing import TextIO

from expertmesh.errors import UserError
from expertmesh.launch.job import RANK_MARK

_RANK_LINE = re.compile(f"{RANK_MARK}(\\d+){RANK_MARK}")


def rank_file(rank: int) -> str:
    """The name of a rank's log."""
    return f"rank_{rank:04}.log"


class Logs:
    """Where lines go. May be used from several threads; use as a context to close the files.

    Args:
        folder: Where the files lie: one per rank, and one per host for what torchrun says. None
            keeps no files. A job that is started again appends to them.
        stream: Where lines are shown.

    Raises:
        UserError: If the folder cannot be made.
    """

    def __init__(self, folder: Path | None, stream: TextIO) -> None:
        self.folder = folder
        self._stream = stream
        self._files: dict[str, TextIO] = {}
        self._lock = threading.Lock()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--log-dir must be a folder that can be made, got {folder}: {error.strerror}"
                ) from error

    def __enter__(self) -> "Logs":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()

    def line(self, host: str, text: str) -> None:
        """Take one line.

        Args:
            host: Where it comes from.
            text: The line as torchrun gave it, without its end.
        """
        found = _RANK_LINE.match(text)
        if found is None:
            who, name = host, f"host_{host}.log"
        else:
            text = text[found.end() :]
            who, name = f"{host}[{found[1]}]", rank_file(int(found[1]))
        with self._lock:
            print(f"{who} {text}", file=self._stream, flush=True)
            if self.folder is not None:
                if name not in self._files:
                    self._files[name] = (self.folder / name).open("a")
                print(text, file=self._files[name], flush=True)
