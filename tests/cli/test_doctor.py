"""The doctor's tables hold what the machine has and what is missing."""

from importlib import metadata

import pytest
import torch

from expertmesh.cli import doctor
from expertmesh.kernels import triton_support
from expertmesh.kernels.moe_mlp import quack
from expertmesh.kernels.moe_mlp.fused import plan


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
    monkeypatch.setattr(triton_support, "TRITON_VERSION", None)
    assert "pip install 'expertmesh[gpu]'" in printed(capsys, monkeypatch)


def cells(line: str) -> list[str]:
    """Of a row of the table of products."""
    words = [word.strip() for word in line.strip("│").split("│")]
    return words if len(words) == 3 and words[0] == "cuda" else []


def on_gpu(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    triton: str | None,
) -> str:
    """What the doctor prints where the probes find a GPU and a version of Triton."""
    monkeypatch.setattr(doctor, "_devices", lambda: [torch.device("cuda")])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    for module in (triton_support, plan):
        monkeypatch.setattr(module, "TRITON_VERSION", triton)
    plan._device_name.cache_clear()
    try:
        return printed(capsys, monkeypatch)
    finally:
        plan._device_name.cache_clear()


def test_on_hopper_every_product_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = on_gpu(capsys, monkeypatch, (9, 0), "3.6.0")
    kernel = {words[1]: words[2] for words in map(cells, text.splitlines()) if words}
    assert kernel["up"].startswith("Triton, tiles of 128 x 256 x 64")
    for product in ("down", "dhidden", "dx"):
        assert kernel[product].startswith("Gluon, two warpgroups by turns, tiles of 128 x 128 x 64")
    assert kernel["dup"] == "Gluon, warps that gather rows, tiles of 256 x 128 x 64"
    assert kernel["ddown"] == "torch's grouped_mm over a copy of the rows by position"
    assert "Gluon kernels   │ used where they are faster" in text
    assert kernel["QuACK's kernels"].startswith("not used: quack-kernels is not installed; run:")
    assert "its kernels are for GPUs" not in text


def test_quack_is_named_where_it_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quack, "QUACK_MISSING", None)
    text = on_gpu(capsys, monkeypatch, (9, 0), "3.7.1")
    kernel = {words[1]: words[2] for words in map(cells, text.splitlines()) if words}
    assert kernel["QuACK's kernels"] == "used where they are faster"
    assert kernel["dup"].startswith("QuACK, tiles of 128 x 256 x 64")
    text = on_gpu(capsys, monkeypatch, (9, 0), "3.6.0")
    assert "QuACK, tiles" not in text, "Gluon's are as fast"


def test_another_triton_runs_without_gluon_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = on_gpu(capsys, monkeypatch, (9, 0), "3.7.1")
    assert "two warpgroups" not in text
    assert "not used: they are written in Gluon" in text
    assert "installed is 3.7.1" in text


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((8, 0), "3.6.0", "its kernels are for compute capability 9, this device has 8.0"),
        ((7, 5), "3.6.0", "its kernels need compute capability 8.0, this device has 7.5"),
        ((9, 0), "3.2.0", "its kernels need Triton 3.6, installed is 3.2.0"),
        ((9, 0), None, "triton is not installed"),
    ],
    ids=str,
)
def test_without_hopper_or_triton_the_reason_stands_there(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    triton: str | None,
    reason: str,
) -> None:
    text = on_gpu(capsys, monkeypatch, capability, triton)
    assert f"none of them: {reason}" in text
    assert ("│ Triton kernels " in text) == (capability == (8, 0))  # the router's run there


def test_extras_come_from_the_package_itself() -> None:
    extras = doctor._packages_by_extra()
    assert "matplotlib" in extras["report"]
    assert "transformers" in extras["hf"]


def test_help_and_unknown_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--nothing"])
    assert stopped.value.code == 2
    assert "usage: expertmesh doctor" in capsys.readouterr().err
