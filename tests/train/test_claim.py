import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.errors import UserError
from expertmesh.train.claim import claim_folder
from expertmesh.train.loop import Trainer
from tests.train.tiny import Silent, make_run

HOLD = """
import os, signal, sys
from expertmesh.train.claim import FolderLock
from pathlib import Path
lock = FolderLock(Path(sys.argv[1]) / ".lock")
print("held", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.toml", 'title = "mine"\n'),
        ("data.json", '[{"text": "mine"}]'),
        ("data.json", '{"text": "mine"}'),
        ("metrics.jsonl", '{"loss": 1.0}\n'),
        ("routing.jsonl", "mine\n"),
        ("expert_tokens.json", "{"),
    ],
)
def test_files_of_others_are_left_alone(tmp_path: Path, name: str, text: str) -> None:
    run = make_run(tmp_path)
    run.folder.mkdir()
    path = run.folder / name
    path.write_text(text)
    with pytest.raises(UserError, match=rf"holds other files \({name}\).*path of a new folder"):
        Trainer(run)
    assert [entry.name for entry in run.folder.iterdir()] == [name]
    assert path.read_text() == text


def test_the_runs_own_data_is_left_alone(tmp_path: Path) -> None:
    text = '{"step": 1, "text": "a line of text that is long enough for a sample"}\n' * 9
    (tmp_path / "run").mkdir()
    source = tmp_path / "run" / "metrics.jsonl"
    source.write_text(text)
    for override in (f"--data.source={source}", f'--data.mix={{"{source}": 1}}'):
        extra = ["--data.source="] if "mix" in override else []
        with pytest.raises(UserError, match=r"holds other files \(metrics\.jsonl\)"):
            Trainer(make_run(tmp_path, *extra, override))
    assert source.read_text() == text


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    Trainer(run)._open_folder()
    (run.folder / "metrics.jsonl").write_text('{"st')
    trainer = Trainer(run)
    assert trainer.fit(Silent()).step == 6


def test_a_folder_that_cannot_be_is_told_before_the_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = tmp_path / "file" / "run"
    with pytest.raises(UserError, match=f"{where}: Not a directory"):
        Trainer(make_run(tmp_path, f"--run.dir={where}", "--data.source=nowhere"))


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            message = rf"another process is training in .*run \(process {other.pid} on .*run\.dir"
            with pytest.raises(UserError, match=message):
                Trainer(run)
        finally:
            other.kill()
    assert Trainer(run).fit(Silent()).step == 6


def test_a_process_does_not_lock_itself_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    first = claim_folder(run, begun=False)
    assert claim_folder(run, begun=False) is first
    (run.folder / ".lock").unlink()
    assert claim_folder(run, begun=False) is not first


def test_a_lock_ends_with_its_trainer(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    Trainer(run).fit(Silent())
    code = "import sys; from pathlib import Path; from expertmesh.train.claim import FolderLock; "
    code += "FolderLock(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(run.folder / ".lock")]
    assert subprocess.run(command, check=False).returncode == 0
