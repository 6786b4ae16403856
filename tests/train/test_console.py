import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expertmesh.train import toml
from expertmesh.train.console import output_may_end
from tests.train.tiny import tables

STEPS = 12


def train(folder: Path, output: int | None) -> "subprocess.Popen[str]":
    """A run of its own process; ``output`` None starts it with standard output closed."""
    (folder / "run.toml").write_text(toml.dumps(tables(folder)))
    words = ["-m", "expertmesh", "train", "run.toml", f"--train.steps={STEPS}"]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh"] if output is None else []
    return subprocess.Popen(
        [*closed, sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_complete(process: "subprocess.Popen[str]", run: Path) -> None:
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == [f"step_{STEPS - 3:08d}", f"step_{STEPS:08d}"]
    assert (run / "expert_tokens.json").exists()


@pytest.mark.parametrize("kind", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_a_run_goes_on_when_nobody_reads_it_any_more(
    tmp_path: Path, kind: Callable[[], tuple[int, int]]
) -> None:
    reader, writer = kind()
    process = train(tmp_path, writer)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as lines:
        while b"step" not in (said := lines.readline()):
            assert said, process.communicate()
    assert_complete(process, tmp_path / "run")


def test_a_run_may_begin_without_an_output(tmp_path: Path) -> None:
    assert_complete(train(tmp_path, None), tmp_path / "run")


def test_no_file_takes_the_place_of_an_output_that_was_closed(tmp_path: Path) -> None:
    file = tmp_path / "numbers"
    code = (
        "import os; from expertmesh.train.console import output_may_end\n"
        f"with output_may_end(), open({str(file)!r}, 'w') as file:\n"
        "    os.write(1, b'a library speaks')\n"
        "    file.write('12')\n"
    )
    subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code], check=True)
    assert file.read_text() == "12"


class Full(io.StringIO):
    """Takes one line."""

    def write(self, text: str) -> int:
        if self.getvalue().endswith("\n"):
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_what_finds_no_room_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Full()
    monkeypatch.setattr(sys, "stdout", stream)
    with output_may_end():
        for word in ("first", "second", "third"):
            print(word, flush=True)
    assert sys.stdout is stream
    assert stream.getvalue() == "first\n"
    with pytest.raises(OSError, match="No space left"):
        print("outside")
