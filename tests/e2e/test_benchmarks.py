"""The benchmarks page holds what the results hold."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_is_what_its_command_writes():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import page; print(page.render(), end='')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
