"""The commands behind OpenMoE's figures, on small models, and what their results hold."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def meshes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("openmoe_meshes")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("openmoe_gpu")


def test_training_learns_its_batch_and_generation_generates(gpu: ModuleType) -> None:
    torch.manual_seed(0)
    setting = gpu.Training(size="base", rows=2, recompute=True)
    bench = gpu.Bench(torch.device("cpu"), 0.2, 16, tiny=True)
    found = gpu.alone(bench.train, setting)
    assert found["last_loss"] < found["first_loss"]
    assert found["samples_per_second"] * 16 == pytest.approx(found["tokens_per_second"], rel=1e-3)
    assert found["flops_per_token"] == 3 * bench.config("base").flops_per_token(16)
    found = gpu.alone(bench.infer, gpu.Inference(size="34b", dtype=torch.float32))
    assert found["ms_per_token"] > 0


def test_what_does_not_fit_is_a_result(gpu: ModuleType) -> None:
    def too_much(_: Any) -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("tried to allocate\nmore")

    setting = gpu.Inference(size="8b", dtype=torch.bfloat16)
    assert gpu.alone(too_much, setting) == {"error": "tried to allocate"}


def test_shares_that_leave_a_host(meshes: ModuleType) -> None:
    assert meshes._spread(list(range(8))) == meshes._ring(list(range(8))) == 0
    assert meshes._spread(list(range(16))) == pytest.approx(8 / 15)
    assert meshes._ring(list(range(16))) == pytest.approx(2 / 16)
    assert meshes._spread([3]) == meshes._ring([3]) == 0
    assert meshes._ring([0, 8]) == 1


def test_the_advice_on_meshes_is_what_the_result_says(meshes: ModuleType) -> None:
    path = FOLDER / "results" / "openmoe_meshes.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert meshes.table(result).count("\n") == 11
    for world in ("8", "64"):
        rows = result["worlds"][world]
        memory = {name: row["memory_total"] for name, row in rows.items()}
        assert min(memory, key=memory.__getitem__) == "hybrid, zero 1"
        others = {name: size for name, size in memory.items() if "hybrid" not in name}
        assert min(others, key=others.__getitem__) == "ep, zero 2"
        assert sum(rows["hybrid, zero 1"]["layers"]) == 24
    rows = result["worlds"]["64"]
    copies, plain = rows["ep_zero, 2 copies, zero 1"], rows["ep, zero 1"]
    assert copies["sent_total"] == plain["sent_total"]
    assert copies["sent_to_other_hosts"] < plain["sent_to_other_hosts"]
