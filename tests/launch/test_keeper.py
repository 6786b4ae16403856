import json
import subprocess
import sys
import time

import pytest

from expertmesh.launch import keeper
from expertmesh.launch.keeper import REPORT

# The agent's place is taken by a program that leaves a child of its own behind.
RUN = """
import sys
from expertmesh.launch import keeper
start = keeper.subprocess.Popen
keeper._WITHOUT_RANKS = 0.5
words = [sys.executable, "-c", {agent!r}]
keeper.subprocess.Popen = lambda _, **options: start(words, **options)
sys.exit(keeper.main())
"""
WITH_CHILD = """
import subprocess, sys, time
subprocess.Popen(["sleep", "60"], start_new_session=True)
print("running", flush=True)
"""


class Kept:
    """A keeper, its order given."""

    def __init__(self, agent, patience=20.0):
        words = [sys.executable, "-u", "-c", RUN.format(agent=agent)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        order = {
            "environment": {},
            "patience": patience,
            "num_processes": 1,
            "torchrun": [],
        }
        self.say(json.dumps(order))

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def result(self):
        """Lines before the report, the report, and the exit status.

        Output ends when nothing is left that holds it.
        """
        lines = self.process.stdout.read().splitlines()
        self.process.stdout.close()
        self.process.stdin.close()
        return lines[:-1], json.loads(lines[-1].removeprefix(REPORT)), self.process.wait()


def test_what_a_job_leaves_behind_is_ended():
    lines, report, status = Kept(WITH_CHILD).result()
    assert lines == ["running"]
    assert report == {"status": 0, "failures": [], "left": 1}
    assert status == 0


def test_a_killed_torchrun_is_told():
    agent = f"{WITH_CHILD}\nimport os; os.kill(os.getpid(), 9)"
    _, report, status = Kept(agent).result()
    assert report == {"status": -9, "failures": [], "left": 1}
    assert status == 1


def test_no_child_is_missed_however_new_deep_or_hidden():
    """Some have only just been started, some clear their environment, some end their parents."""
    agent = """
import os, subprocess
for number in range(30):
    subprocess.Popen(["env", "-i", "sleep", "60"], start_new_session=True)
    subprocess.Popen(["sh", "-c", "(sleep 60 & sleep 60) & sleep 60"])
    subprocess.Popen(["true"])
os.kill(os.getpid(), 9)
"""
    begin = time.monotonic()
    _, report, _ = Kept(agent).result()
    assert time.monotonic() - begin < 40, "something outlived the job and held its output"
    assert report["status"] == -9
    # Some shells are ended before they have started anything.
    assert report["left"] >= 60


@pytest.mark.parametrize("how", ["stop", "end of input"])
def test_it_stops_in_order(how):
    agent = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saving'), sys.exit(3)))\n"
        f"{WITH_CHILD}\ntime.sleep(60)"
    )
    kept = Kept(agent)
    assert kept.process.stdout.readline() == "running\n"
    if how == "stop":
        kept.say("stop")
    else:
        kept.process.stdin.close()
    lines, report, _ = kept.result()
    assert lines == ["saving"]
    assert report == {"status": 3, "failures": [], "left": 1}


@pytest.mark.parametrize("then", ["stop", "end of input"])
def test_torchrun_is_asked_once(then):
    """As where a terminal closes: a signal comes, and the output that nobody takes ends the job."""
    agent = """
import signal, subprocess, sys
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1) or print("asked", flush=True))
rank = subprocess.Popen(["sh", "-c", "echo running; sleep 4"])
rank.wait()
sys.exit(len(asked))
"""
    kept = Kept(agent, patience=60.0)
    assert kept.process.stdout.readline() == "running\n"
    kept.say("stop")
    assert kept.process.stdout.readline() == "asked\n"
    if then == "stop":
        kept.say("stop")
    else:
        kept.process.stdin.close()
    lines, report, _ = kept.result()
    assert lines == []
    assert report == {"status": 1, "failures": [], "left": 0}


@pytest.mark.parametrize(("line", "patience"), [("stop", 0.3), ("kill", 60.0)])
def test_it_does_not_wait_for_ever(line, patience):
    agent = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"{WITH_CHILD}\ntime.sleep(60)"
    )
    kept = Kept(agent, patience)
    assert kept.process.stdout.readline() == "running\n"
    kept.say(line)
    _, report, _ = kept.result()
    assert report == {"status": -9, "failures": [], "left": 1}


def test_torchrun_is_not_waited_for_without_ranks():
    """As where it waits for a host that is gone; a rank that still saves is waited for."""
    agent = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rank = subprocess.Popen(["sh", "-c", "echo running; sleep 3; echo saved"])
rank.wait()
time.sleep(60)
"""
    kept = Kept(agent, patience=60.0)
    assert kept.process.stdout.readline() == "running\n"
    kept.say("stop")
    begin = time.monotonic()
    lines, report, _ = kept.result()
    assert time.monotonic() - begin < 40
    assert lines == ["saved"]
    assert report == {"status": -9, "failures": [], "left": 0}


def test_ranks_share_the_cores(monkeypatch):
    seen = {}
    monkeypatch.setattr(keeper, "_num_cores", lambda: 7)
    monkeypatch.setattr(keeper.subprocess, "Popen", lambda words, env, **_: seen.update(env))
    for told, num_processes, threads in [
        ({}, 2, "3"),
        ({}, 8, "1"),
        ({"OMP_NUM_THREADS": "5"}, 2, "5"),
    ]:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        order = {"environment": told, "num_processes": num_processes, "torchrun": []}
        keeper._start(order, "report", "folder")
        assert seen["OMP_NUM_THREADS"] == threads
