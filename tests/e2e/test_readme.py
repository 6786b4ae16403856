"""The README's commands, run as they stand in a copy of the repository's own files.

The copy uses this environment in place of a new one, and trains for fewer steps.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
STEPS = "ARGS=--train.steps=6 --train.batch=4 --eval.batches=2"
SHORTER = {
    "--train.steps=60": "--train.steps=6 --train.batch=4 --eval.batches=2",
    "--train.epochs=0.05": (
        "--train.epochs=0.001 --train.batch=1 --train.micro_batch=1 --eval.batches=1"
    ),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Files as git would give them, with an environment that counts as installed."""
    folder = tmp_path_factory.mktemp("readme") / "expertmesh"
    folder.mkdir()
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "expertmesh"):
        wrapper = binaries / name
        wrapper.write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
        wrapper.chmod(0o755)
    for marker in ("installed", "installed-dev"):
        (folder / ".venv" / marker).touch()
    return folder


def run(clone, command, *arguments):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CI": "true",
    }
    words = [*command, *arguments]
    done = subprocess.run(
        words, cwd=clone, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_of_the_readme(clone):
    """In order: the demo first, and everything after it."""
    assert COMMANDS[:2] == ["make demo", "make test"]
    demo = run(clone, ["make", "demo"], STEPS)
    assert "report.html" in demo
    for name in ("report.html", "samples.txt", "metrics.jsonl", "figures/load.png"):
        assert (clone / "runs/nano" / name).stat().st_size > 0, name
    # This test is part of `make test`, so only what that would run is looked at.
    assert "pytest" in run(clone, ["make", "--dry-run", "test"])
    for command in COMMANDS[2:]:
        for whole, part in SHORTER.items():
            command = command.replace(whole, part)
        run(clone, ["bash", "-c", command])
    assert (clone / "runs/mine/report.html").exists()
