"""examples/slurm.sh, run as on a node of an allocation, with Slurm's programs played by scripts."""

import argparse
import os
import re
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm.sh"

# Options of Slurm 22.05's srun and sbatch, as their manuals have them.
SRUN = ("--ntasks-per-node", "--kill-on-bad-exit", "--output")
SBATCH = (
    "--job-name",
    "--nodes",
    "--ntasks-per-node",
    "--exclusive",
    "--time",
    "--signal",
    "--output",
)
PLAYED = {
    "scontrol": 'test "$*" = "show hostnames n[3-4]" && printf "n3\\nn4\\n"',
    "srun": 'for o; do case $o in -*) echo "$o" >>srun.txt; shift;; *) break;; esac; done; "$@"',
    "torchrun": 'printf "%s\\n" "$@" >torchrun.txt',
}


@pytest.fixture
def run(tmp_path):
    for name, body in PLAYED.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run_script(*words, node="0", **variables):
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "n[3-4]",
            "SLURM_JOB_ID": "12345678",
            "SLURM_NNODES": "2",
            "SLURM_NODEID": node,
        }
        return subprocess.run(
            ["bash", str(SCRIPT), *words],
            cwd=tmp_path,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return run_script


def test_bash_understands_it():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("node", ["0", "1"])
def test_torchrun_understands_what_it_is_told(run, tmp_path, node):
    done = run("run.toml", "--data.source=a b", node=node, SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 0, done.stderr
    args = parse_args((tmp_path / "torchrun.txt").read_text().splitlines())
    assert (args.nnodes, args.nproc_per_node) == ("2", "8")
    assert args.rdzv_backend == "c10d"
    assert args.rdzv_endpoint == "n3:25678"
    assert args.rdzv_conf == f"is_host={int(node == '0')}"
    assert args.rdzv_id == "12345678"
    assert args.max_restarts == 3
    assert (args.module, args.training_script) == (True, "expertmesh")
    assert args.training_script_args == ["train", "run.toml", "--data.source=a b"]


def test_without_gpus_a_node_runs_one_process(run, tmp_path):
    assert run("run.toml").returncode == 0
    assert "--nproc-per-node=1" in (tmp_path / "torchrun.txt").read_text().splitlines()


def test_slurm_knows_its_flags(run, tmp_path):
    assert run("run.toml").returncode == 0
    for name, known, words in [
        ("srun", SRUN, (tmp_path / "srun.txt").read_text().splitlines()),
        ("sbatch", SBATCH, re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)),
    ]:
        parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
        for option in known:
            parser.add_argument(option, nargs="?")
        parser.parse_args(words)
        assert words


def test_without_a_run_file_it_says_how_it_is_used(run):
    done = run()
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr


def test_a_failing_torchrun_fails_the_job(run, tmp_path):
    (tmp_path / "torchrun").write_text("#!/bin/bash\nexit 7\n")
    assert run("run.toml").returncode == 7
