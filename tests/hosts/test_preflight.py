"""Hosts that cannot take part, over real ssh: all are named, before anything starts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import expertmesh
from tests.hosts.launching import all_ended, launch, wait_until
from tests.hosts.network import PORT

pytestmark = pytest.mark.hosts

TRAIN = ["--nproc-per-node=1", "--", "train", "run.toml"]


@pytest.fixture
def other_version(network, tmp_path):
    """A port of host b where another version of this package is found first."""
    package = Path(expertmesh.__file__).parent
    copy = tmp_path / "other" / "expertmesh"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    init = copy / "__init__.py"
    own = f'__version__ = "{expertmesh.__version__}"'
    assert own in init.read_text()
    init.write_text(init.read_text().replace(own, '__version__ = "0.0.7"'))
    network.serve(network.b, PORT + 1, settings=f"SetEnv PYTHONPATH={copy.parent}")
    return PORT + 1


def refused(network, folder, hosts, **aliases):
    """The lines of a launch that is refused."""
    (folder / "hosts").write_text("\n".join(hosts))
    status, out, err = launch(network, folder, *TRAIN, ssh=network.ssh(**aliases))
    assert (status, out) == (2, "")
    assert not list((folder / "logs").iterdir())
    assert all_ended(network)
    return err.splitlines()


def test_every_host_that_cannot_is_named(network, tmp_path, other_version):
    address = network.b.address
    lines = refused(
        network,
        tmp_path,
        ["a", "stranger", "closed", "older", "b"],
        stranger=f"HostName {address}\nPubkeyAuthentication no",
        closed=f"HostName {address}\nPort 9",
        older=f"HostName {address}\nPort {other_version}",
    )
    assert lines[0] == "error: 3 of 5 hosts cannot take part; nothing was started"
    assert lines[1].startswith("  stranger: ssh: ")
    assert "Permission denied (publickey)" in lines[1]
    assert lines[1].endswith("`ssh stranger true` must work without a password")
    assert lines[2].startswith("  closed: ssh: ")
    assert "Connection refused" in lines[2]
    assert lines[3] == f"  older: expertmesh 0.0.7, here {expertmesh.__version__}"
    assert len(lines) == 4


def test_a_first_host_that_others_cannot_reach(network, tmp_path):
    """Its address is on the link to the head; the other host has no way there."""
    lines = refused(network, tmp_path, ["control", "b"], control=f"HostName {network.a.control}")
    assert lines == [
        "error: 1 of 2 hosts cannot take part; nothing was started",
        f"  b: cannot reach {network.a.control}:29500, where all hosts meet: "
        "Network is unreachable; open the port, or set another one with --port",
    ]


def test_a_meeting_port_that_is_taken(network, tmp_path):
    code = "import socket, sys; s = socket.create_server(('', 29500)); print(flush=True); input()"
    words = network.a.words(sys.executable, "-c", code)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        (tmp_path / "hosts").write_text("a\nb\n")
        status, out, err = launch(network, tmp_path, *TRAIN)
        other.communicate(b"\n")
    assert (status, out) == (2, "")
    assert "  a: cannot listen on port 29500, where all hosts meet: Address already in use" in err
    wait_until(lambda: all_ended(network), "processes are left on the hosts")
