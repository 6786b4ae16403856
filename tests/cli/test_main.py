import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.cli import main as module
from expertmesh.cli.main import COMMANDS, main
from expertmesh.errors import MissingDependency, UserError


def command(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Put a function in place of `expertmesh train`."""
    fake = SimpleNamespace(HELP="", main=run)
    monkeypatch.setattr(module.importlib, "import_module", lambda name: fake)


def test_help_lists_every_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line) > 20


def test_nothing_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: expertmesh COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: expertmesh {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("expertmesh 0.")


def test_unknown_command_shows_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "error: unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("k must be 1"), "error: k must be 1"),
        (ValueError("k must be 2"), "error: k must be 2"),
        (MissingDependency("pip install 'expertmesh[hf]'"), "error: pip install 'expertmesh[hf]'"),
        (OSError(28, "No space left on device", "/x/y"), "error: /x/y: No space left on device"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_two(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(argv: list[str]) -> int:
        raise error

    command(monkeypatch, run)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == message + "\n"
    monkeypatch.setenv("EXPERTMESH_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["train"])


def too_much_for_torch() -> None:
    import torch

    torch.empty(1 << 55)


def too_much_for_numpy() -> None:
    import numpy as np

    np.empty(1 << 55)


def too_much_for_a_gpu() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")


@pytest.mark.parametrize("allocate", [too_much_for_torch, too_much_for_numpy, too_much_for_a_gpu])
def test_memory_that_runs_out_is_one_line(
    allocate: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        allocate()
        return 0

    command(monkeypatch, run)
    assert main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out: ")
    assert "set a smaller model (model.dim" in line


def test_other_errors_are_ours_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str]) -> int:
        raise RuntimeError("a defect")

    command(monkeypatch, run)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train"])


def test_ctrl_c_ends_cleanly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(argv: list[str]) -> int:
        raise KeyboardInterrupt

    command(monkeypatch, run)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["train", "--help"], ["data", "list"], ["doctor"]]
)
def test_a_reader_that_is_gone_is_no_failure(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = _buffered(words, writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"]])
def test_output_that_finds_no_room_is_one_line(words: list[str], tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        done = _buffered(words, file.fileno(), file_size=0)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: File too large\n"


def test_what_was_printed_stands_before_the_mistake() -> None:
    code = (
        "import sys; from expertmesh.cli import main as cli, data\n"
        "def run(argv): print('first'); raise ValueError('then')\n"
        "data.main = run; sys.exit(cli.main(['data']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=_buffering(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "first\nerror: then\n")


def _buffered(
    words: list[str], output: int, *, file_size: int = resource.RLIM_INFINITY
) -> "subprocess.CompletedProcess[str]":
    limits = (file_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    return subprocess.run(
        [sys.executable, "-m", "expertmesh", *words],
        env=_buffering(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )


def _buffering() -> dict[str, str]:
    """The environment, with Python holding output back as it does unless told otherwise."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


def test_as_a_module_with_a_mistake() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "expertmesh", "train", "nowhere.toml", "--train.steps=1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == "error: the run file nowhere.toml does not exist\n"


@pytest.mark.parametrize("told", [None, "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_waiting_threads_sleep_soon_unless_told_otherwise(
    told: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    if told is not None:
        monkeypatch.setenv(told, "active")
    main(["--version"])
    assert os.environ.get("GOMP_SPINCOUNT") == {None: "1000", "GOMP_SPINCOUNT": "active"}.get(told)
