"""Where Triton's kernels are not tried, and what is said about it."""

from importlib import metadata

import pytest
import torch

from expertmesh.kernels import triton_support
from expertmesh.kernels.triton_support import triton_refusal

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "TRITON_VERSION", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def test_runs_on_hopper() -> None:
    assert triton_refusal(CUDA) is None


@pytest.mark.parametrize("version", ["3.6", "3.6.0+git1234", "3.10.1", "4.0.0", ""])
def test_newer_and_unknown_versions_run(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "TRITON_VERSION", version)
    assert triton_refusal(CUDA) is None


def test_an_old_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "TRITON_VERSION", "3.5.1")
    assert "need Triton 3.6, installed is 3.5.1" in str(triton_refusal(CUDA))


def test_an_amd_gpu_is_refused_although_its_capability_reads_like_hopper(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for AMD" in str(triton_refusal(CUDA))


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_refusal(torch.device("cpu")) == "Triton has no kernels for the CPU"
    assert triton_refusal(torch.device("mps")) == "Triton has no kernels for mps"


def test_the_package_of_nightly_builds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "pytorch-triton":
            return "3.7.0+git"
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(triton_support.metadata, "version", version)
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: object())
    assert triton_support._installed() == "3.7.0+git"
    monkeypatch.setattr(triton_support.importlib.util, "find_spec", lambda name: None)
    assert triton_support._installed() is None
