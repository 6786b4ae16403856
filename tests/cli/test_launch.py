import os
import signal
import sys

import pytest

from expertmesh.cli.launch import main
from expertmesh.errors import UserError
from expertmesh.launch import preflight, supervise
from expertmesh.launch.node import Failure
from expertmesh.launch.supervise import Outcome
from expertmesh.train import toml
from tests.train.tiny import tables

FINE = Outcome((), None)


@pytest.fixture(autouse=True)
def run_file(tmp_path, monkeypatch):
    """``run.toml`` in the folder that the command is started in."""
    (tmp_path / "run.toml").write_text(toml.dumps(tables(tmp_path)))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def started(monkeypatch):
    """Jobs that were started, in place of starting them; all hosts pass as able."""
    jobs = []
    monkeypatch.setattr(preflight, "check_hosts", lambda places, port, folder: jobs.append("tried"))
    monkeypatch.setattr(supervise, "run_job", lambda job, logs: jobs.append(job) or FINE)
    return jobs


def test_on_this_machine(started):
    words = ["--standalone", "--nproc-per-node", "4", "--gpus", "0,1,2,5", "--max-restarts=2"]
    assert main([*words, "--", "train", "--mesh.ep=4", "--", "run.toml"]) == 0
    (job,) = started
    assert job.program == ("-m", "expertmesh", "train", "--mesh.ep=4", "--", "run.toml")
    assert [(host.name, host.num_processes) for host in job.hosts] == [("localhost", 4)]
    assert (job.gpus, job.max_restarts, job.rendezvous.port) == ("0,1,2,5", 2, None)
    assert job.folder == os.getcwd()


def test_without_standalone_the_port_is_known(started):
    main(["--nproc-per-node=1", "--", "train", "run.toml"])
    main(["--nproc-per-node=1", "--port=1234", "--", "train", "run.toml"])
    assert [job.rendezvous.port for job in started] == [29500, 1234]


def test_on_hosts_that_are_tried_first(started, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb\n")
    words = ["--hostfile", str(hosts), "--nproc-per-node=1", "--ssh", "ssh -F 'my config'"]
    assert main([*words, "--", "train", "run.toml"]) == 0
    tried, job = started
    assert tried == "tried"
    assert [(host.name, host.num_processes) for host in job.hosts] == [("a", 2), ("b", 1)]
    assert job.places[1].command([], "/")[:3] == ["ssh", "-F", "my config"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc-per-node=2"], "must stand after `--` and begin with `train`, got nothing"),
        (["--nproc-per-node=2", "--"], "got nothing; as in: expertmesh launch --standalone"),
        (["--nproc-per-node=2", "--", "eval", "runs/one"], "got eval runs/one"),
        (["--", "train", "x"], "--nproc-per-node must say how many"),
        (["--nproc-per-node=0", "--", "train", "x"], "--nproc-per-node must be at least 1, got 0"),
        (
            ["--nproc-per-node=1", "--max-restarts=-1", "--", "train", "x"],
            "--max-restarts must be at least 0, got -1",
        ),
        (["--nproc-per-node=1", "--port=70000", "--", "train", "x"], "--port must be between"),
        (
            ["--standalone", "--nproc-per-node=1", "--port=7", "--", "train", "x"],
            "--standalone takes a free port, got --port 7 too",
        ),
        (
            ["--nproc-per-node=3", "--gpus=0,1", "--", "train", "x"],
            "for each of the 3 processes of a host, got 2: 0,1; set --nproc-per-node=2",
        ),
        (["--nproc-per-node=1", "--", "train", "x"], "the run file x does not exist"),
        (
            ["--nproc-per-node=1", "--", "train", "run.toml", "--train.stpes=3"],
            "unknown option --train.stpes; did you mean 'train.steps'",
        ),
        (["--nproc-per-node=1", "--gpus=0,,1", "--", "train", "x"], "must be a list such as"),
        (["--nproc-per-node=2", "--gpus=1,1", "--", "train", "x"], "got '1,1'"),
        (["--hostfile=nowhere", "--", "train", "x"], "--hostfile must be a file"),
        (
            ["--nproc-per-node=1", "--ssh=ssh -p 2", "--", "train", "x"],
            "--ssh is for the hosts of a --hostfile, got 'ssh -p 2' without one",
        ),
    ],
)
def test_options_that_do_not_fit(words, message, started):
    with pytest.raises(UserError, match=message):
        main(words)
    assert started == []


@pytest.mark.parametrize(
    ("ssh", "message"),
    [("ssh '", "--ssh must be words for a shell, got ssh '"), (" ", "--ssh must say how ssh")],
)
def test_how_ssh_is_called_is_checked(ssh, message, started, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\n")
    with pytest.raises(UserError, match=message):
        main([f"--hostfile={tmp_path / 'hosts'}", f"--ssh={ssh}", "--", "train", "x"])
    assert started == []


def test_here_and_elsewhere_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--standalone", "--hostfile=x", "--", "train", "x"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_failure_names_host_rank_and_log(tmp_path, monkeypatch, capsys):
    failures = (
        Failure("b", 3, "was ended by SIGKILL", consequence=False, seconds=1.0),
        Failure("a", 0, "ended with status 1", consequence=True, seconds=1.0),
    )
    monkeypatch.setattr(supervise, "run_job", lambda job, logs: Outcome(failures, None))
    words = [
        "--standalone",
        "--nproc-per-node=1",
        f"--log-dir={tmp_path}",
        "--",
        "train",
        "run.toml",
    ]
    assert main(words) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: rank 3 on b was ended by SIGKILL; everything was stopped",
        f"  its log: {tmp_path}/rank_0003.log",
        "  also: rank 0 on a ended with status 1",
    ]


def test_a_signal_shows_in_the_exit_status(monkeypatch, capsys):
    outcome = Outcome((), signal.SIGTERM)
    monkeypatch.setattr(supervise, "run_job", lambda job, logs: outcome)
    assert main(["--standalone", "--nproc-per-node=1", "--", "train", "run.toml"]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


def test_importing_it_waits_for_no_torch():
    code = (
        "import sys, expertmesh.cli.launch, expertmesh.launch.supervise;"
        "import expertmesh.launch.preflight; sys.exit('torch' in sys.modules)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_two_ranks_for_real(capfd, tmp_path):
    """Through torchrun; the data's absence makes both ranks fail with their own words."""
    words = ["--standalone", "--nproc-per-node=2", "--log-dir=logs", "--", "train", "run.toml"]
    assert main([*words, "--data.source=nowhere.txt"]) == 1
    out, err = capfd.readouterr()
    assert "on localhost ended with status 2; everything was stopped" in err
    message = "error: data.source 'nowhere.txt' is neither a file"
    logs = [tmp_path / "logs" / f"rank_000{rank}.log" for rank in (0, 1)]
    told = [rank for rank in (0, 1) if logs[rank].exists() and message in logs[rank].read_text()]
    assert told
    assert f"localhost[{told[0]}] {message}" in out
