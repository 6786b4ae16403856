"""Published folders over a GPU, RAM and disk. Run with ``-m gpu``; needs the extra ``hf``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.hf import OpenMoeForCausalLM
from expertmesh.models import DecoderLM
from tests.openmoe.folders import write_folder
from tests.openmoe.test_example_inference import EXAMPLE, answer
from tests.openmoe.vocabulary import write_small

pytestmark = pytest.mark.gpu

BY_NAME = {
    "": 0,
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.layers.3.mlp.experts": "cpu",
    "lm_head": "disk",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DecoderLM]:
    """A folder with a tokenizer, and the decoder whose values it holds."""
    path = tmp_path_factory.mktemp("openmoe")
    vocabulary = write_small(tmp_path_factory.mktemp("vocabulary"))
    return path, write_folder(path, tokenizer=vocabulary, vocab_size=1000)


@pytest.fixture
def tokens() -> torch.Tensor:
    ids = torch.randint(2, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    return ids


@pytest.mark.parametrize(
    "placing",
    [
        {"device_map": "auto"},
        {"device_map": BY_NAME},
        {"device_map": "auto", "max_memory": {0: "3MB", "cpu": "2900KB", "disk": "1GB"}},
    ],
    ids=["gpu", "by-name", "by-memory"],
)
def test_numbers_do_not_depend_on_where_weights_lie(
    model: tuple[Path, DecoderLM], tokens: torch.Tensor, tmp_path: Path, placing: dict[str, Any]
) -> None:
    path, decoder = model
    loaded = OpenMoeForCausalLM.from_pretrained(path, offload_folder=tmp_path, **placing)
    if "max_memory" in placing or placing["device_map"] is BY_NAME:
        assert set(loaded.hf_device_map.values()) == {0, "cpu", "disk"}
    with torch.no_grad():
        expected = decoder.double()(tokens)
        logits = loaded(tokens.cuda()).logits
    torch.testing.assert_close(logits.cpu().double(), expected, rtol=1e-4, atol=1e-4)


def test_a_batch_with_padding_on_the_left_is_its_rows(
    model: tuple[Path, DecoderLM], tokens: torch.Tensor, tmp_path: Path
) -> None:
    path, _ = model
    loaded = OpenMoeForCausalLM.from_pretrained(
        path, device_map=BY_NAME, offload_folder=tmp_path, dtype=torch.float64
    )
    short = tokens[:1, :4]
    batch = torch.cat([torch.cat([torch.zeros_like(tokens[:1, :5]), short], dim=1), tokens[1:]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    made = loaded.generate(batch.cuda(), **options)
    assert torch.equal(made[0, 5:], loaded.generate(short.cuda(), **options)[0])
    assert torch.equal(made[1], loaded.generate(tokens[1:].cuda(), **options)[0])


def test_the_example_runs_over_gpu_ram_and_disk(
    model: tuple[Path, DecoderLM], tmp_path: Path
) -> None:
    path, _ = model
    command = [sys.executable, str(EXAMPLE), "--model", str(path), "--dtype", "float32"]
    command += ["--question", "how many?", "--max-new-tokens", "5"]
    command += ["--max-memory", "0=3MB,cpu=2900KB,disk=1GB", "--offload-folder", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    devices = {line.split()[0] for line in out.splitlines() if "  model." in line}
    assert devices == {"0", "cpu", "disk"}
    assert answer(path) in out
    assert "GPU 0: " in out


def test_the_example_runs_where_all_fits_one_gpu(model: tuple[Path, DecoderLM]) -> None:
    path, _ = model
    command = [sys.executable, str(EXAMPLE), "--model", str(path), "--dtype", "float32"]
    command += ["--question", "how many?", "--max-new-tokens", "5"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer(path) in out
    assert "cpu" not in out
