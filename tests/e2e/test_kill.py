"""Ranks that die during training under torchrun: the job stops, restarts, and loses nothing."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from expertmesh.train import toml
from tests.ports import free_port
from tests.train.tiny import tables

pytestmark = pytest.mark.slow

STEPS = 150
SAVE_EVERY = 10
# From a rank's death to the end of every process. torchrun gives ranks 30 s after asking them to
# stop; a machine that does other things too needs some more.
BOUND = 60.0


class Job:
    """Plain torchrun, which keeps one store for all starts, with ranks that train.

    Attributes:
        out: What it printed, once it ended.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        num_ranks: int,
        *words: str,
        restarts: int = 0,
        agents: int = 1,
    ):
        self.folder = folder / run
        self.out = ""
        # torchrun's own number differs between its restarts; this one stays.
        self._mark = f"EXPERTMESH_TEST={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        torchrun = ["--standalone"]
        if agents > 1:  # as on several hosts
            meet = f"--rdzv-endpoint=localhost:{free_port()}"
            torchrun = [f"--nnodes={agents}", "--rdzv-backend=c10d", meet, "--rdzv-id=kill"]
        torchrun += [f"--nproc-per-node={num_ranks // agents}", f"--max-restarts={restarts}"]
        torchrun += [f"--log-dir={folder / 'torchrun'}"]
        train = ["-m", "expertmesh", "train", "run.toml", f"--run.dir={run}", "--mesh.timeout=300"]
        self._log = folder / f"{run}.log"
        with self._log.open("a") as log:
            self._processes = [
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *torchrun, *train, *words],
                    cwd=folder,
                    env=os.environ | {"OMP_NUM_THREADS": "1", name: value},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for _ in range(agents)
            ]

    def pid(self, rank: int) -> int | None:
        """A rank's process id; None while there is none."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if self._mark.encode() in words and f"RANK={rank}".encode() in words:
                return int(path.parent.name)
        return None

    def step(self) -> int:
        """The newest logged step."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        return json.loads(whole[-1])["step"] if whole else 0

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 240
        while self.step() < step:
            assert self._running(), self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.01)

    def wait_for_start(self, times: int) -> None:
        """Wait until the run was continued so many times."""
        deadline = time.monotonic() + 240
        while self._log.read_text().count("continuing after") < times:
            assert self._running(), self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def signal(self, rank: int, number: signal.Signals) -> int:
        """Send a signal to a rank; its process id."""
        pid = self.pid(rank)
        assert pid is not None, self._log.read_text()
        os.kill(pid, number)
        return pid

    def end(self, seconds: float) -> int:
        """Wait; the exit status. No process is left then."""
        deadline = time.monotonic() + seconds
        statuses = [p.wait(timeout=deadline - time.monotonic()) for p in self._processes]
        self.out = self._log.read_text()
        assert all(self.pid(rank) is None for rank in range(4))
        return max(statuses)

    def _running(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        """End what is left, whatever happened."""
        for rank in range(4):
            if (pid := self.pid(rank)) is not None:
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path):
    written = tables(tmp_path)
    written["train"] |= {"steps": STEPS, "save_every": SAVE_EVERY}
    written["eval"] = {"every": 0, "batches": 1}
    (tmp_path / "run.toml").write_text(toml.dumps(written))
    jobs = []

    def start_job(*words, **options):
        jobs.append(Job(tmp_path, *words, **options))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.stop()


def losses(job):
    """Each step's loss; no step is missing, none is there twice."""
    path = job.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def test_three_deaths_in_a_row_change_no_bit(start):
    """Rank 0, which writes the logs, among them."""
    undisturbed = start("undisturbed", 2, "--mesh.ep=2")
    assert undisturbed.end(300) == 0, undisturbed.out
    job = start("killed", 2, "--mesh.ep=2", restarts=3)
    for attempt, (step, rank) in enumerate(((25, 1), (65, 0), (105, 1)), start=1):
        job.wait_for_step(step)
        job.signal(rank, signal.SIGKILL)
        job.wait_for_start(attempt)
    assert job.end(300) == 0, job.out
    continued = [int(step) for step in re.findall(r"continuing after step (\d+)", job.out)]
    assert len(continued) == 3
    assert all(step % SAVE_EVERY == 0 and step > 0 for step in continued)
    assert losses(job) == losses(undisturbed)


def test_agents_of_several_hosts_start_again_together(start):
    """Only the agent whose rank died counts a restart; the other follows it."""
    job = start("killed", 2, "--mesh.ep=2", restarts=2, agents=2)
    for attempt, (step, rank) in enumerate(((25, 0), (65, 1)), start=1):
        job.wait_for_step(step)
        job.signal(rank, signal.SIGKILL)
        job.wait_for_start(attempt)
    assert job.end(300) == 0, job.out
    losses(job)


def test_without_restarts_it_stops_and_fewer_ranks_go_on(start):
    undisturbed = start("undisturbed", 1)
    assert undisturbed.end(300) == 0, undisturbed.out
    job = start("killed", 4, "--mesh.ep=2")
    job.wait_for_step(25)
    pid = job.signal(3, signal.SIGKILL)
    begin = time.monotonic()
    assert job.end(BOUND) == 1
    assert time.monotonic() - begin < BOUND
    assert re.search(rf"rank +: 3 .*\n +exitcode +: -9 \(pid: {pid}\)", job.out)
    assert "Signal 9 (SIGKILL)" in job.out

    fewer = start("killed", 2, "--mesh.ep=2")
    assert fewer.end(300) == 0, fewer.out
    assert re.search(r"continuing after step [1-9]\d*0\b", fewer.out)
    for one, other in zip(losses(undisturbed), losses(fewer), strict=True):
        assert math.isclose(one, other, rel_tol=1e-5)


def test_a_rank_that_hangs_is_not_waited_for_longer_than_the_timeout(start):
    timeout = 30
    job = start("hanging", 2, "--mesh.ep=2", f"--mesh.timeout={timeout}")
    job.wait_for_step(15)
    job.signal(1, signal.SIGSTOP)
    assert job.end(timeout + BOUND) == 1
    assert re.search(r"(?i)timed? ?out", job.out)
