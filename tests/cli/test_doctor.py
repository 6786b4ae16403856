"""The doctor's tables hold what the machine has and what is missing."""

from importlib import metadata

import pytest
import torch

from expertmesh.cli import doctor
from expertmesh.kernels import triton_support


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    assert doctor.main([]) == 0
    return capsys.readouterr().out


def test_names_versions_backends_and_choices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(capsys, monkeypatch)
    assert torch.__version__ in text
    for backend in ("gather", "grouped_mm", "loop", "reference"):
        assert backend in text
    assert "grouped_mm takes float32, float16 and bfloat16, not torch.float64" in text


def test_missing_extra_shows_the_pip_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version

    def version(package: str) -> str:
        if package == "matplotlib":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(doctor.metadata, "version", version)
    text = printed(capsys, monkeypatch)
    assert "pip install 'expertmesh[report]'" in text


def test_brackets_in_a_reason_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_support, "_INSTALLED", False)
    assert "pip install 'expertmesh[gpu]'" in printed(capsys, monkeypatch)


def test_extras_come_from_the_package_itself() -> None:
    extras = doctor._packages_by_extra()
    assert "matplotlib" in extras["report"]
    assert "transformers" in extras["hf"]


def test_help_and_unknown_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--nothing"])
    assert stopped.value.code == 2
    assert "usage: expertmesh doctor" in capsys.readouterr().err
