"""SIGTERM, Ctrl-C and a closed terminal ask for a stop, which follows the running step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """A context in which SIGTERM, SIGINT and SIGHUP are remembered instead of ending the process.

    The second one acts as it would have outside, so a run that hangs can still be ended; but not
    SIGHUP, which comes twice when a terminal closes: from the shell, and from the kernel as the
    shell ends. Handlers exist in the main thread only; elsewhere nothing is caught. SIGHUP stays
    ignored where it is, as under ``nohup``.

    Attributes:
        name: The signal's name once one came, else None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        self._restore(keep=signal.SIGHUP)

    def _restore(self, *, keep: int | None = None) -> None:
        for number in self._previous.keys() - {keep}:
            signal.signal(number, self._previous.pop(number))
