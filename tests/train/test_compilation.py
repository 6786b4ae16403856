import pytest
import torch
from torch import nn

from expertmesh.train.compilation import compile_model


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"'no-such-compiler' is not found.*train.compile = false"):
        compile_model(nn.Linear(2, 2), torch.device("cpu"))


def test_an_accelerator_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert callable(compile_model(nn.Linear(2, 2), torch.device("cuda")))
