"""Published folders from a GPU and onto it. Run with ``-m gpu``."""

from pathlib import Path

import pytest
import torch

from expertmesh.convert.published import load_published, save_published
from expertmesh.models import DecoderLM, decoder_preset

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    config = decoder_preset("openmoe-test", vocab_size=500)
    with torch.device("cuda"):
        model = DecoderLM(config, seed=1).to(dtype)
    save_published(model, tmp_path / "saved", shard_bytes=300_000)
    with torch.device("meta"):
        loaded = DecoderLM(config).to(dtype)
    load_published(loaded, tmp_path / "saved", device="cuda")
    expected = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert tensor.is_cuda
        assert torch.equal(tensor, expected[name]), name
