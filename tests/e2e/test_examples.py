"""The example scripts run under torchrun, and any number of ranks gives the same loss."""

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from expertmesh.testing import run_on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def last_loss(output: str) -> float:
    match = re.search(r"last loss ([\d.]+)", output)
    assert match is not None, output
    return float(match[1])


def torchrun(script: str, ranks: int, folder: Path) -> str:
    """What a script prints; torchrun's own files go into a folder."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--log-dir={folder}",
        f"--nproc-per-node={ranks}", str(EXAMPLES / script),
    ]  # fmt: skip
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def play(script: str, ep: int) -> str:
    """The same on ranks that are there already; what this one prints."""
    os.environ["EP"] = str(ep)
    output = io.StringIO()
    with (
        patch.object(dist, "init_process_group"),
        patch.object(dist, "destroy_process_group"),
        redirect_stdout(output),
    ):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return output.getvalue()


def test_ddp_with_dealt_out_experts_equals_ddp_with_copies(tmp_path: Path) -> None:
    copies = run_on_ranks(2, play, "ddp.py", 1)[0]
    assert "ep=1" in copies
    dealt_out = torchrun("ddp.py", 2, tmp_path)
    assert "ep=2" in dealt_out
    assert last_loss(dealt_out) == pytest.approx(last_loss(copies), rel=1e-5)


@pytest.mark.slow
def test_fsdp_on_four_ranks_equals_one_process(tmp_path: Path) -> None:
    (alone,) = run_on_ranks(1, play, "fsdp.py", 1)
    output = torchrun("fsdp.py", 4, tmp_path)
    assert last_loss(output) == pytest.approx(last_loss(alone), rel=1e-5)
