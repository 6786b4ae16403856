"""One published-style folder for the tests that only read it."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from expertmesh.models import DecoderLM
from tests.openmoe.folders import write_folder


class Folder(NamedTuple):
    """A folder, and the decoder whose values it holds."""

    path: Path
    model: DecoderLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Float64, one safetensors file, LLaMA by its own word."""
    path = tmp_path_factory.mktemp("openmoe")
    return Folder(path, write_folder(path, dtype=torch.float64, num_layers=2))


@pytest.fixture
def tokens() -> torch.Tensor:
    """``(2, 7)`` ids that begin with id 0."""
    ids = torch.randint(2, 512, (2, 7), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    return ids
