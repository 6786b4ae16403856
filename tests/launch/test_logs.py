import io

import pytest

from expertmesh.errors import UserError
from expertmesh.launch.job import RANK_MARK
from expertmesh.launch.logs import Logs


def test_lines_carry_host_and_rank_and_each_rank_has_a_file(tmp_path):
    shown = io.StringIO()
    with Logs(tmp_path / "logs", shown) as logs:
        logs.line("one", f"{RANK_MARK}0{RANK_MARK}step 1")
        logs.line("two", f"{RANK_MARK}12{RANK_MARK}step 1: 5 < 6")
        logs.line("two", "torchrun says")
        logs.line("one", f"{RANK_MARK}0{RANK_MARK}step 2")
    assert shown.getvalue().splitlines() == [
        "one[0] step 1",
        "two[12] step 1: 5 < 6",
        "two torchrun says",
        "one[0] step 2",
    ]
    written = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert written == {
        "rank_0000.log": "step 1\nstep 2\n",
        "rank_0012.log": "step 1: 5 < 6\n",
        "host_two.log": "torchrun says\n",
    }


def test_a_second_start_appends(tmp_path):
    for text in ("first", "second"):
        with Logs(tmp_path, io.StringIO()) as logs:
            logs.line("one", f"{RANK_MARK}0{RANK_MARK}{text}")
    assert (tmp_path / "rank_0000.log").read_text() == "first\nsecond\n"


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Logs(None, io.StringIO()) as logs:
        logs.line("one", "text")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--log-dir must be a folder that can be made, got .*file"):
        Logs(tmp_path / "file", io.StringIO())
