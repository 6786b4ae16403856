"""The benchmarks are scripts, which find each other beside themselves."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark's module by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module
