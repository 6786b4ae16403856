"""The example scripts run under torchrun, and any number of ranks gives the same loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def last_loss(script: str, ranks: int, **environ: str) -> float:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", str(EXAMPLES / script),
    ]  # fmt: skip
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    match = re.search(r"last loss ([\d.]+)", run.stdout)
    assert match is not None, run.stdout
    return float(match[1])


def test_ddp_with_dealt_out_experts_equals_ddp_with_copies() -> None:
    assert last_loss("ddp.py", 2) == pytest.approx(last_loss("ddp.py", 2, EP="1"), rel=1e-5)


@pytest.mark.slow
def test_fsdp_on_four_ranks_equals_one_process() -> None:
    assert last_loss("fsdp.py", 4) == pytest.approx(last_loss("fsdp.py", 1), rel=1e-5)
