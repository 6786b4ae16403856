import signal
import threading
from collections.abc import Iterator

import pytest

from expertmesh.train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_remembered_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.name
        signal.raise_signal(number)
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_closed_terminal_is_remembered_but_not_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.name == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.name is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_terminal_that_closes_may_say_so_twice(first: signal.Signals) -> None:
    """The shell passes it on, and the kernel sends it once more when the shell has ended."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ends = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest() as stop:
            signal.raise_signal(first)
            handler = signal.getsignal(signal.SIGHUP)
            assert handler not in (signal.SIG_DFL, signal.SIG_IGN)
            signal.raise_signal(signal.SIGHUP)
            assert stop.name == first.name
            assert signal.getsignal(signal.SIGTERM) is ends
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def terminal() -> Iterator[None]:
    """Ctrl-C as it is in a terminal: it is ignored in what a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("terminal")
def test_second_ctrl_c_interrupts() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_catch_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
