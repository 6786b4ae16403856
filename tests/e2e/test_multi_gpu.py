"""Every section of the benchmark of several GPUs, in sizes of a test, on two CPU processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECTIONS = ["training", "equivalence", "layer", "checkpoint", "openmoe"]


def run(folder: Path, *words: str) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += [f"--log-dir={folder / 'torchrun'}"]
    script = [str(ROOT / "benchmarks" / "multi_gpu.py"), "--tiny", f"--results={folder}"]
    done = subprocess.run(
        [*torchrun, *script, *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(folder: Path) -> dict:
    return json.loads((folder / "multi_gpu.json").read_text(encoding="utf-8"))


def test_all_sections_and_one_again(tmp_path):
    printed = run(tmp_path)
    assert "failed" not in printed
    assert "left out: no time" not in printed
    assert "MISSED equivalence" not in printed
    assert "MISSED checkpoint" not in printed
    assert "MISSED openmoe" not in printed
    first = result(tmp_path)
    assert [name for name in first if name in SECTIONS] == SECTIONS
    for precision, limit in (("fp32", 1e-5), ("bf16", 1e-2)):
        rows = first["equivalence"]["errors"][precision]
        assert {"dp2 zero0", "ep2 zero3", "etp2 zero2", "tp2 ep2 zero2"} <= rows.keys()
        assert {"cp2 ep2 zero3", "pp2 zero1", "pp2 interleaved2 zero2"} <= rows.keys()
        assert all(max(row["losses"], row["norms"]) < limit for row in rows.values())
    dropless, static = first["layer"]["tiny"], first["layer"]["tiny static"]
    assert dropless["GB/s plain, even"] > 0
    assert dropless["bytes sent"]["counts"] == 4
    assert static["bytes sent"]["dispatch"] == static["message bytes"]
    speeds = first["training"]["tokens per second per device"]
    assert list(speeds) == [
        "1 device",
        "transformers, 1 device",
        "dp",
        "ep",
        "ep_zero",
        "transformers, FSDP2",
    ]
    assert min(speeds.values()) > 0
    assert first["training"]["torchtitan"].startswith("torchtitan is left out: ")
    maps = first["openmoe"]["maps"]
    assert [row["blocks"] for row in maps.values()] == [{"cpu": 4}, *[{"cpu": 2, "disk": 2}] * 2]

    printed = run(tmp_path, "checkpoint")
    assert "layer" not in printed
    second = result(tmp_path)
    assert second["layer"] == first["layer"]
    assert second["checkpoint"]["losses"] == first["checkpoint"]["losses"]
