"""Training over two hosts by ``expertmesh launch``, and its ends. Needs root; see ``network.py``.

The hosts share this machine's files, as those of a cluster share theirs.
"""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertmesh.train import toml
from tests.hosts.launching import (
    all_ended,
    drive,
    ended,
    environment,
    launch,
    ranks_on,
    start,
    wait_until,
)
from tests.train.tiny import tables

pytestmark = pytest.mark.hosts

MESH = ["--mesh.strategy=ep_zero", "--mesh.timeout=120"]
LONG = ["--train.steps=100000", "--train.save_every=0", "--eval.every=0"]
WHOLE = ["--train.steps=60", "--train.save_every=10", "--eval.every=30"]
RESTARTS = "--max-restarts=2"


def prepared(folder, slots=2):
    """A folder with a run file and a host file."""
    (folder / "run.toml").write_text(toml.dumps(tables(folder)))
    (folder / "hosts").write_text(f"a slots={slots}\nb slots={slots}\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    return prepared(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(network, tmp_path_factory):
    """The folder of a run over both hosts that nothing disturbed, and what was printed."""
    folder = prepared(tmp_path_factory.mktemp("undisturbed"))
    words = [RESTARTS, "--", "train", "run.toml", *MESH, *WHOLE]
    status, out, err = launch(network, folder, *words)
    assert status == 0, out + err
    assert all_ended(network)
    return folder, out


@contextmanager
def training(network, folder, process):
    """Wait for the first step of a job that trains on until something ends it."""
    log = folder / "logs" / "rank_0000.log"
    try:
        wait_until(
            lambda: process.poll() is not None or (log.exists() and "step " in log.read_text()),
            "the job did not start",
        )
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: all_ended(network), "processes are left on the hosts")


@pytest.fixture
def endless(request, network, tmp_path):
    """A job that trains on; the parameter is how many ranks a host has."""
    prepared(tmp_path, slots=getattr(request, "param", 1))
    job = start(network, tmp_path, "--", "train", "run.toml", *MESH, *LONG)
    with training(network, tmp_path, job):
        yield job


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_hosts_train_as_one_process_does(undisturbed):
    folder, out = undisturbed
    words = ["train", "run.toml", *WHOLE, f"--run.dir={folder / 'alone'}"]
    alone = [sys.executable, "-m", "expertmesh", *words]
    subprocess.run(alone, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
    expected, got = losses(folder / "alone"), losses(folder / "run")
    assert len(expected) == 60
    for one, other in zip(expected, got, strict=True):
        assert math.isclose(one, other, rel_tol=2e-6)
    speakers = {line.split()[0] for line in out.splitlines() if " step " in line}
    assert speakers == {"a[0]"}
    assert "step 60/60" in (folder / "logs" / "rank_0000.log").read_text()


def trainer(host, rank):
    """The process id of a rank."""
    for pid in ranks_on(host):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in words:
            return pid
    raise AssertionError(f"rank {rank} is not on {host.name}")


@pytest.mark.parametrize("endless", [2], indirect=True)
def test_a_killed_rank_stops_both_hosts_and_is_named(network, endless):
    os.kill(trainer(network.b, 3), signal.SIGKILL)
    out, err = endless.communicate(timeout=120)
    assert endless.returncode == 1, out
    first, log, *others = err.splitlines()
    assert first == "error: rank 3 on b was ended by SIGKILL; everything was stopped"
    assert log == "  its log: logs/rank_0003.log"
    assert all(line.startswith("  also: ") for line in others)
    assert all_ended(network)


def test_after_a_death_both_hosts_start_again(network, folder, undisturbed):
    """The loss of every step is that of a run without the death, to the last bit."""
    killed = start(network, folder, RESTARTS, "--", "train", "run.toml", *MESH, *WHOLE)
    metrics = folder / "run" / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") > 15, "it did not train"
    )
    os.kill(trainer(network.b, 3), signal.SIGKILL)
    status, out, err = ended(killed)
    assert status == 0, out + err
    assert "a[0] continuing after step " in out
    assert losses(folder / "run") == losses(undisturbed[0] / "run")
    assert len(losses(folder / "run")) == 60
    assert all_ended(network)


def test_ctrl_c_lets_the_step_end_and_saves(network, tmp_path, endless):
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=120)
    assert endless.returncode == 128 + signal.SIGINT
    assert err == "stopped by SIGINT\n"
    assert "everything is saved" in out
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert all_ended(network)


def test_a_launcher_that_is_killed_takes_its_hosts_along(network, endless):
    endless.kill()
    endless.communicate()
    wait_until(lambda: all_ended(network), "processes are left on the hosts", seconds=60)


def test_a_cut_cable_ends_the_job(network, folder):
    """The ssh connection to b ends; a's ranks cannot go on without b's."""
    program = ["-m", "expertmesh", "train", str(folder / "run.toml"), *MESH, *LONG]
    # Once its ranks have ended, a's torchrun is not waited for, however much patience there is.
    job = drive(network, folder / "logs", *program, patience=300.0)
    with training(network, folder, job):
        os.kill(session(network, "b"), signal.SIGKILL)
        out, err = job.communicate(timeout=120)
    # Its status is the number of failures, which are its last lines.
    assert job.returncode > 0, out + err
    assert out.splitlines()[-job.returncode].startswith("b was lost (status -9): ")


def session(network, host):
    """The process id of the head's ssh to a host."""
    pids = subprocess.check_output(["ip", "netns", "pids", network.head.name], text=True).split()
    (pid,) = (
        int(pid)
        for pid in pids
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-3:-2] == [host.encode()]
    )
    return pid
