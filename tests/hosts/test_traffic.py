"""What crosses the cable between two hosts, by the counters of the virtual link."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.parallel.strategies import strategy
from tests.hosts.launching import environment

pytestmark = pytest.mark.hosts

ROOT = Path(__file__).parents[2]
STEPS = 6


def counted(network, folder, placement):
    """What the ranks of ``traffic_job`` say, by rank."""
    shutil.copy(Path(__file__).with_name("traffic_job.py"), folder)
    driver = [sys.executable, "-m", "tests.hosts.driver", network.ssh(), "a,b", str(folder)]
    program = [str(folder / "traffic_job.py"), placement, str(STEPS)]
    done = subprocess.run(
        network.head.words(*driver, *program),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [(folder / f"rank_{rank:04}.log").read_text() for rank in range(4)]
    return [
        json.loads(next(line for line in log.splitlines() if line.startswith("{"))) for log in logs
    ]


def test_of_expert_traffic_only_the_all_to_all_leaves_a_host(network, tmp_path):
    """In ``ep_zero``: the copies of an expert are neighbours."""
    ranks = counted(network, tmp_path, strategy("ep_zero", 4, 4).placement)
    assert [rank["ep"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["edp"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for host in (ranks[:2], ranks[2:]):
        crossing = sum(rank["all_to_all"] for rank in host)
        link = min(rank["link"] for rank in host)
        # Headers of TCP, IP and Ethernet, acknowledgements, the router's few parameters.
        assert crossing < link < 1.15 * crossing
        assert crossing < STEPS * host[0]["experts"] / 4


def test_copies_on_other_hosts_would_send_their_gradients(network, tmp_path):
    """The same with ``placement="inside"``: the all-to-all stays, the experts' gradients leave."""
    ranks = counted(network, tmp_path, "inside")
    assert [rank["ep"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for host in (ranks[:2], ranks[2:]):
        # Half of every gradient goes to the other copy, and half of every parameter comes back.
        gradients = STEPS * host[0]["experts"] / 2
        assert min(rank["link"] for rank in host) > 2 * gradients
        assert all(rank["all_to_all"] > 0 for rank in host)
