import json
import os
import signal
import subprocess
import sys
import time

FAILING = """
import os, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), 9)
time.sleep(60)
"""


def run(tmp_path, source, *options):
    (tmp_path / "rank.py").write_text(source)
    words = ["-m", "expertmesh.launch.agent", str(tmp_path / "report.json"), "--standalone"]
    words.append(f"--log-dir={tmp_path}")  # torchrun leaves it in the system's folder otherwise
    return subprocess.Popen(
        [sys.executable, *words, *options, "--nproc-per-node=2", str(tmp_path / "rank.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # torchrun says a word about it where it is not set.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_rank_that_was_killed_is_reported(tmp_path):
    process = run(tmp_path, FAILING)
    process.communicate(timeout=60)
    assert process.returncode == 1
    failures = json.loads((tmp_path / "report.json").read_text())
    assert (1, -signal.SIGKILL) in [(each["rank"], each["status"]) for each in failures]


def test_a_signal_is_one_line(tmp_path):
    process = run(tmp_path, "import os, time; os.write(1, b'up\\n'); time.sleep(60)")
    # Both ranks run before the signal comes; torchrun may say a word of its own before.
    lines = iter(process.stdout.readline, "")
    assert "up\n" in lines
    assert "up\n" in lines
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "torchrun stopped its ranks: SIGTERM" in said
    assert "Traceback" not in said
    assert not (tmp_path / "report.json").exists()
