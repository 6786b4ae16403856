"""What crosses the cable between two hosts, by the counters of the virtual link."""

import json

import pytest

from expertmesh.parallel.strategies import strategy
from tests.hosts.launching import ROOT, drive, ended

pytestmark = pytest.mark.hosts

STEPS = 6
OUTSIDE = strategy("ep_zero", 4, 4).placement


@pytest.fixture(scope="module")
def counted(network, tmp_path_factory):
    """What the ranks of ``traffic_job`` say: by placement, then by rank."""
    folder = tmp_path_factory.mktemp("traffic")
    job = str(ROOT / "tests" / "hosts" / "traffic_job.py")
    status, out, err = ended(drive(network, folder, job, str(STEPS), OUTSIDE, "inside"))
    assert status == 0, out + err
    logs = [(folder / f"rank_{rank:04}.log").read_text() for rank in range(4)]
    answers = [
        json.loads(line) for log in logs for line in log.splitlines() if line.startswith("{")
    ]
    return {
        placement: [answer for answer in answers if answer["placement"] == placement]
        for placement in (OUTSIDE, "inside")
    }


def test_of_expert_traffic_only_the_all_to_all_leaves_a_host(counted):
    """In ``ep_zero``: the copies of an expert are neighbours."""
    ranks = counted[OUTSIDE]
    assert [rank["ep"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["edp"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for host in (ranks[:2], ranks[2:]):
        crossing = sum(rank["all_to_all"] for rank in host)
        link = min(rank["link"] for rank in host)
        # Headers of TCP, IP and Ethernet, acknowledgements, the router's few parameters.
        assert crossing < link < 1.15 * crossing
        assert crossing < STEPS * host[0]["experts"] / 4


def test_copies_on_other_hosts_would_send_their_gradients(counted):
    """The same with ``placement="inside"``: the all-to-all stays, the experts' gradients leave."""
    ranks = counted["inside"]
    assert [rank["ep"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    for host in (ranks[:2], ranks[2:]):
        # Half of every gradient goes to the other copy, and half of every parameter comes back.
        gradients = STEPS * host[0]["experts"] / 2
        assert min(rank["link"] for rank in host) > 2 * gradients
        assert all(rank["all_to_all"] > 0 for rank in host)
