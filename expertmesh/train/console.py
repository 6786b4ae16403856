"""Standard output that may go away while a run trains."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def output_may_end() -> Iterator[None]:
    """Go on inside where standard output takes no more: its reader, terminal or room is gone.

    What is printed from then on is thrown away; a run's folder holds its numbers. Also a decorator.
    """
    # None where the program was started with its output closed; `print` says nothing then.
    if sys.stdout is None:
        _keep_the_number()
        yield
        return
    with contextlib.redirect_stdout(_Output(sys.stdout)):
        yield


def _keep_the_number() -> None:
    """Else the next file or socket gets it, and takes what a library prints."""
    try:
        os.fstat(1)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != 1:
            os.dup2(nowhere, 1)
            os.close(nowhere)


class _Output(io.TextIOBase):
    """Passes on what is written, as long as it is taken."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a plain attribute there
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Point the stream at nothing: also what it still holds back, to the program's end."""
        # A stream that is no file of the system has no number, and refuses each line by itself.
        with contextlib.suppress(OSError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
