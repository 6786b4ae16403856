"""Training over two hosts by ``expertmesh launch``, and its ends. Needs root; see ``network.py``.

The hosts share this machine's files, as those of a cluster share theirs.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.train import toml
from tests.hosts.launching import (
    PATIENCE,
    all_ended,
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


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run.toml").write_text(toml.dumps(tables(tmp_path)))
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    return tmp_path


@pytest.fixture
def endless(network, folder):
    """A job that trains on, until something ends it."""
    process = start(network, folder, "--", "train", "run.toml", *MESH, *LONG)
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


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_hosts_train_as_one_process_does(network, folder):
    alone = [sys.executable, "-m", "expertmesh", "train", "run.toml", "--run.dir=alone"]
    subprocess.run(alone, cwd=folder, env=environment(), check=True, stdout=subprocess.DEVNULL)
    words = ["train", "run.toml", "--run.dir=together", *MESH]
    status, out, err = launch(network, folder, "--", *words)
    assert status == 0, out + err
    expected, got = losses(folder / "alone"), losses(folder / "together")
    assert len(expected) == 6
    for one, other in zip(expected, got, strict=True):
        assert math.isclose(one, other, rel_tol=2e-6)
    speakers = {line.split()[0] for line in out.splitlines() if " step " in line}
    assert speakers == {"a[0]"}
    assert "step 6/6" in (folder / "logs" / "rank_0000.log").read_text()
    assert all_ended(network)


def trainer(host, rank):
    """The process id of a rank."""
    for pid in ranks_on(host):
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in words:
            return pid
    raise AssertionError(f"rank {rank} is not on {host.name}")


def test_a_killed_rank_stops_both_hosts_and_is_named(network, folder, endless):
    os.kill(trainer(network.b, 3), signal.SIGKILL)
    out, err = endless.communicate(timeout=120)
    assert endless.returncode == 1, out
    first, log, *others = err.splitlines()
    assert first == "error: rank 3 on b was ended by SIGKILL; everything was stopped"
    assert log == "  its log: logs/rank_0003.log"
    assert all(line.startswith("  also: ") for line in others)
    assert all_ended(network)


def test_after_a_death_both_hosts_start_again(network, folder):
    """The loss of every step is that of a run without the death, to the last bit."""
    steps = ["--train.steps=60", "--train.save_every=10", "--eval.every=0"]
    words = ["--max-restarts=2", "--", "train", "run.toml", *MESH, *steps]
    status, out, err = launch(network, folder, *words, "--run.dir=undisturbed")
    assert status == 0, out + err
    killed = start(network, folder, *words, "--run.dir=killed")
    metrics = folder / "killed" / "metrics.jsonl"
    wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") > 15, "it did not train"
    )
    os.kill(trainer(network.b, 3), signal.SIGKILL)
    out, err = killed.communicate(timeout=PATIENCE)
    assert killed.returncode == 0, out + err
    assert "a[0] continuing after step " in out
    assert losses(folder / "killed") == losses(folder / "undisturbed")
    assert len(losses(folder / "killed")) == 60
    assert all_ended(network)


def test_ctrl_c_lets_the_step_end_and_saves(network, folder, endless):
    endless.send_signal(signal.SIGINT)
    out, err = endless.communicate(timeout=120)
    assert endless.returncode == 128 + signal.SIGINT
    assert err == "stopped by SIGINT\n"
    assert "everything is saved" in out
    assert list((folder / "run" / "checkpoints").glob("step_*"))
    assert all_ended(network)


def test_a_launcher_that_is_killed_takes_its_hosts_along(network, folder, endless):
    endless.kill()
    endless.communicate()
    wait_until(lambda: all_ended(network), "processes are left on the hosts", seconds=60)


def test_a_cut_cable_ends_the_job(network, folder, endless):
    """The ssh connection to b ends; a's ranks cannot go on without b's."""
    (session,) = (
        pid
        for pid in subprocess.check_output(
            ["ip", "netns", "pids", network.head.name], text=True
        ).split()
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-3:-2] == [b"b"]
    )
    os.kill(int(session), signal.SIGKILL)
    _, err = endless.communicate(timeout=120)
    assert endless.returncode == 1
    assert err.startswith("error: b was lost (status -9): ")
