import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertmesh.launch import supervise
from expertmesh.launch.keeper import REPORT
from expertmesh.launch.logs import Logs
from expertmesh.launch.supervise import run_job
from tests.launch.fakes import FakePlace, job

ROOT = Path(__file__).parents[2]
REPORTING = f"""
import json, sys, time
order = json.loads(sys.stdin.readline())
def report(status, *failures):
    keys = ("rank", "status", "seconds")
    found = [dict(zip(keys, failure)) for failure in failures]
    print({REPORT!r} + json.dumps({{"status": status, "failures": found}}))
    sys.exit(0)
"""
GOOD = REPORTING + "print('all is well'); report(0)"
OBEYING = REPORTING + "print('heard', sys.stdin.readline().strip()); report(1)"
DEAF = REPORTING + "import signal; [sys.stdin.readline() for _ in range(9)]; time.sleep(60)"


def ending(*failures):
    return f"{REPORTING}report(1, *{failures!r})"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Only of hosts that end when they are asked to; on a busy machine any of them may be late."""
    monkeypatch.setattr(supervise, "_SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(supervise, "_BEYOND_PATIENCE_SECONDS", 60.0)


def run(**sources):
    """The outcome and the output of hosts that run these sources."""
    shown = io.StringIO()
    places = [FakePlace(name, source) for name, source in sources.items()]
    with Logs(None, shown) as logs:
        outcome = run_job(job(*places), logs)
    return outcome, shown.getvalue()


def test_all_goes_well():
    outcome, shown = run(a=GOOD, b=GOOD)
    assert outcome.failures == ()
    assert outcome.stopped_by is None
    assert sorted(shown.splitlines()) == ["a all is well", "b all is well"]


def test_a_failing_rank_stops_all_and_is_named():
    outcome, shown = run(a=OBEYING, b=ending((3, 2, 10)), c=OBEYING)
    assert [str(failure) for failure in outcome.failures] == ["rank 3 on b ended with status 2"]
    assert sorted(shown.splitlines()) == ["a heard stop", "c heard stop"]


def test_the_first_failure_comes_first_and_a_killed_rank_before_those_that_miss_it():
    outcome, _ = run(a=ending((0, 1, 9), (1, -6, 8)), b=ending((2, -15, 10), (3, -9, 10)))
    assert [str(failure) for failure in outcome.failures] == [
        "rank 3 on b was ended by SIGKILL",
        "rank 1 on a was ended by SIGABRT",
        "rank 0 on a ended with status 1",
    ]


def test_a_rank_that_someone_else_stopped():
    outcome, _ = run(a=ending((0, -15, 9)), b=OBEYING)
    assert [str(failure) for failure in outcome.failures] == ["rank 0 on a was ended by SIGTERM"]


def test_torchrun_itself_may_fail():
    outcome, _ = run(a=REPORTING + "print('no port'); report(1)", b=OBEYING)
    (failure,) = outcome.failures
    assert str(failure) == "a ended with status 1 (torchrun): no port"


def test_a_connection_that_is_lost(monkeypatch):
    # A host that was asked to stop and is lost then did not answer.
    monkeypatch.setattr(supervise, "_SETTLE_SECONDS", 60.0)
    lost = REPORTING + "print('Connection to a closed by remote host.'); sys.exit(255)"
    outcome, _ = run(a=lost, b=ending((2, 1, 5)))
    assert str(outcome.failures[0]) == (
        "a was lost (status 255): Connection to a closed by remote host."
    )
    assert str(outcome.failures[1]) == "rank 2 on b ended with status 1"


def test_a_host_that_does_not_stop_is_given_up(monkeypatch):
    monkeypatch.setattr(supervise, "_BEYOND_PATIENCE_SECONDS", 0.5)
    start = time.monotonic()
    outcome, _ = run(a=ending((0, 1, 9)), b=DEAF)
    assert time.monotonic() - start < 20
    assert [failure.host for failure in outcome.failures] == ["a", "b"]
    assert "did not answer when asked to stop" in str(outcome.failures[1])


def launcher(source, before=""):
    """A process that launches one host with this source, and says how that ended."""
    code = (  # SIGHUP as usual, though these tests may run under nohup
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"{before}import sys;"
        "from tests.launch.test_supervise import run_job, Logs, FakePlace, job;"
        f"outcome = run_job(job(FakePlace('a', {source!r}), patience=60), Logs(None, sys.stdout));"
        "print(outcome)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_signal_asks_and_a_second_one_kills():
    listening = "print('ready')\nfor _ in '12': print(sys.stdin.readline().strip())\nreport(1)"
    twice = REPORTING + listening
    with launcher(twice) as process:
        heard = [process.stdout.readline()]
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            heard.append(process.stdout.readline())
        assert heard == ["a ready\n", "a stop\n", "a kill\n"]
        (outcome,) = process.stdout.read().splitlines()
    assert outcome == "Outcome(failures=(), stopped_by=<Signals.SIGTERM: 15>)"


def test_a_signal_that_another_thread_catches(tmp_path):
    """As one that comes just before the wait begins: Python's handlers run in the main thread."""
    now = tmp_path / "now"
    catching = (
        "import os, signal, threading, time\n"
        "def catch():\n"
        f"    while not os.path.exists({str(now)!r}): time.sleep(0.05)\n"
        "    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)\n"
        "threading.Thread(target=catch, daemon=True).start()\n"
    )
    source = f"{REPORTING}\nprint('ready')\nprint(sys.stdin.readline().strip()); report(1)"
    with launcher(source, catching) as process:
        assert process.stdout.readline() == "a ready\n"
        now.touch()
        assert process.stdout.readline() == "a stop\n"
        assert "SIGTERM" in process.stdout.read()


def test_a_terminal_that_closes_may_say_so_twice():
    """The shell passes it on, and the kernel sends it once more when the shell has ended."""
    source = f"{REPORTING}\nprint('ready')\nfor _ in '12': print(sys.stdin.readline().strip())"
    with launcher(f"{source}\nreport(1)") as process:
        heard = [process.stdout.readline()]
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            process.send_signal(number)
            if number == signal.SIGTERM or len(heard) == 1:
                heard.append(process.stdout.readline())
            else:
                time.sleep(0.3)
                assert process.poll() is None
        outcome = process.stdout.read()
    assert heard == ["a ready\n", "a stop\n", "a kill\n"]
    assert "SIGTERM" in outcome


def test_a_terminal_may_close_under_nohup():
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    source = f"{REPORTING}\nprint('ready')\nprint(sys.stdin.readline().strip()); report(1)"
    with launcher(source, ignoring) as process:
        assert process.stdout.readline() == "a ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "a stop\n"
        assert "SIGTERM" in process.stdout.read()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    run(a=GOOD)
    assert signal.getsignal(signal.SIGTERM) is before


def test_hosts_hear_it_when_the_launching_process_is_killed(tmp_path):
    witness = tmp_path / "witness"
    listening = (
        f"{REPORTING}\nprint('ready')\nrest = sys.stdin.read()\n"
        f"open({str(witness)!r}, 'w').write('end')"
    )
    with launcher(listening) as process:
        assert process.stdout.readline() == "a ready\n"
        process.kill()
    deadline = time.monotonic() + 20
    while not witness.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert witness.exists()
