"""The command behind the memory figures of loading, on a small model."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from expertmesh.convert.openmoe import layout
from expertmesh.models import decoder_preset

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("openmoe_load")


def test_folders_of_holes_are_published_folders(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_folder(tmp_path, "test", 512)
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_blocks * 512 < file.stat().st_size / 4
    tensors = load_file(file)
    expected = layout(decoder_preset("openmoe-test", vocab_size=512)).their_shapes
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert not any(bool(tensor.any()) for tensor in tensors.values())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_every_small_setting_is_measured(benchmark: ModuleType) -> None:
    whole, spread = (benchmark.measure(setting) for setting in benchmark.TINY.values())
    assert whole["new_tokens"] == spread["new_tokens"] == 32
    assert spread["devices"] == ["cpu", "disk"]
    assert whole["dtype"] == "bfloat16"
    assert whole["host_gb"] > 0
