"""Remembered kernels start what Triton would start, seen by a driver that starts nothing."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_same_is_started() -> None:
    """In a process of its own: Triton is not to be in its interpreter there."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("remembered_program.py"))]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
