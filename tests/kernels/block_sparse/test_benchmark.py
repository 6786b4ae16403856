"""The benchmark's command on a small shape, and what its result holds."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("block_sparse_gpu")
    monkeypatch.setattr(module, "BLOCK", 16)
    return module


@pytest.mark.slow
def test_tiny_run_writes_its_figures(bench: ModuleType, tmp_path: Path) -> None:
    path = bench.main(["--tiny", "--rounds", "1"], tmp_path)
    result = json.loads(path.read_text())
    times = result["median_ms"]["tiny"]
    assert set(times["forward"]) == {"grouped_mm", "triton", "block_sparse"}
    assert all(ms > 0 for row in times.values() for ms in row.values())
    errors = result["relative_error"]["tiny"]
    assert set(errors) == {"y", "dx", "dweight", "dup", "ddown"}
    assert max(errors.values()) < 1e-5
    unequal = result["unequal"]["tiny"]
    assert unequal["widths"] == [32, 96]
    assert set(unequal["median_ms"]["forward and backward"]) == {
        "block_sparse",
        "grouped_mm, padded",
        "triton, padded",
    }
    assert set(result["parts_ms"]["tiny"]) == {"topology", "gather", "SDD", "DSD"}


def test_unequal_widths_keep_the_sum(bench: ModuleType) -> None:
    for hidden, num_experts in ((1024, 64), (14336, 8), (256, 128)):
        widths = bench.spread(hidden, num_experts)
        assert all(width % 16 == 0 for width in widths)
        assert sum(widths) == pytest.approx(hidden * num_experts, rel=0.01)
        assert max(widths) >= 2.8 * min(widths)
