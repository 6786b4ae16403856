import pytest
import torch

from expertmesh.models import DecoderLM, decoder_preset
from expertmesh.train.compilation import compiled_forward


@pytest.fixture
def model() -> DecoderLM:
    with torch.device("meta"):
        return DecoderLM(decoder_preset("nano"))


def test_a_missing_compiler_is_named(model: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"'no-such-compiler' is not found.*train.compile = false"):
        compiled_forward(model, torch.device("cpu"))


def test_an_accelerator_needs_none(model: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert callable(compiled_forward(model, torch.device("cuda")))
