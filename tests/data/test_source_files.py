import pytest

from expertmesh.data.records import RECORD_READERS
from expertmesh.data.source_files import find_files, instruction_source
from expertmesh.errors import UserError


def test_a_folder_of_many_shards_in_the_order_of_their_paths(tmp_path):
    names = ["arxiv/2.jsonl", "arxiv/10.jsonl", "c4/a.jsonl.zst", "b.parquet", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    files = find_files(str(tmp_path), tuple(RECORD_READERS))
    order = ["arxiv/10.jsonl", "arxiv/2.jsonl", "b.parquet", "c4/a.jsonl.zst"]
    assert [path.relative_to(tmp_path).as_posix() for path in files.paths] == order
    assert files.facts["files"] == 4
    assert files.facts["bytes"] == sum(map(len, order))
    assert files.identity(("a",)) != files.identity(("b",))


def test_a_folder_without_such_files(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds no file with one of the endings \.jsonl, "):
        find_files(str(tmp_path), tuple(RECORD_READERS))


def test_names_of_instruction_data(tmp_path):
    assert instruction_source("a/b", "task") == "hf:a/b@task"
    assert instruction_source("a/b") == "hf:a/b"
    assert instruction_source("alpaca-demo", "task") == "alpaca-demo"
    assert instruction_source(str(tmp_path), "task") == str(tmp_path)
    assert instruction_source("hf:a/b:test", "task") == "hf:a/b:test"


@pytest.mark.parametrize("dataset", ["nofile.jsonl", "own/set.parquet", "./own", "~/own", "a/b/c"])
def test_the_hub_is_not_asked_for_a_path(dataset):
    with pytest.raises(UserError, match=r"neither a file, a folder, .* nor OWNER/NAME of the hub"):
        instruction_source(dataset, "task")
