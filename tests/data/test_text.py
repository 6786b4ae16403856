import errno
import json

import pyarrow
import pytest
from pyarrow import parquet

from expertmesh.data import source_files
from expertmesh.data.text import read_corpus, read_file
from expertmesh.errors import UserError


def documents(source, **options):
    return list(read_corpus(str(source), **options).documents())


def write(path, words):
    path.write_text(words, encoding="utf-8")
    return path


def test_a_text_file_is_one_document(tmp_path):
    path = write(tmp_path / "a.txt", "naïve\r\n\n語 🙂")
    assert documents(path) == ["naïve\n\n語 🙂"]


def test_an_unknown_ending_is_text_when_named(tmp_path):
    assert documents(write(tmp_path / "README", "words")) == ["words"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("words".encode("utf-8-sig"))
    assert documents(tmp_path / "a.txt") == ["words"]


def test_a_folder_is_read_by_relative_path(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "b.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "z.jsonl", '{"text": "third"}\n\n{"text": "fourth"}\n')
    write(tmp_path / "picture.png", "not text")
    assert documents(tmp_path) == ["first", "second", "third", "fourth"]


def test_documents_without_text_are_left_out(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", " \n")
    write(tmp_path / "c.txt", "x")
    assert documents(tmp_path) == ["x"]


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_records_of_each_format(tmp_path, ending):
    records = [{"q": "why", "a": "because, of é"}, {"q": "who", "a": ""}]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif ending == "csv":
        write(path, 'q,a\nwhy,"because, of é"\nwho,\n')
    else:
        lines = "\n".join(json.dumps(record) for record in records)
        write(path, lines if ending == "jsonl" else json.dumps(records))
    assert documents(path, fields=("q", "a")) == ["why\nbecause, of é", "who"]


def test_a_csv_field_may_be_long(tmp_path):
    path = write(tmp_path / "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(documents(path)[0]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8.*byte 3"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}', r"a\.jsonl:1 has no field 'text'; did you mean 'txt'"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' is not text but 3"),
        ("a.jsonl", b'["x"]', r"a\.jsonl:1: expected an object"),
        ("a.json", b'{"text": "x"}', r"a\.json: expected a list"),
        ("a.csv", b"body\nx\n", r"a\.csv:2 has no field 'text'"),
        ("a.parquet", b"PAR?", r"a\.parquet is not a readable parquet"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_file(tmp_path / name))


def test_a_parquet_column_that_is_not_there(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has no field 'text'"):
        documents(tmp_path / "a.parquet")


def test_a_missing_path_is_named():
    with pytest.raises(UserError, match="'no/such/file' is neither a file"):
        read_corpus("no/such/file")


def test_a_misspelt_name_has_the_nearest():
    with pytest.raises(UserError, match="did you mean 'classics'"):
        read_corpus("clasics")


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="holds no file"):
        read_corpus(str(tmp_path))


def test_a_tokenizer_is_not_text():
    with pytest.raises(UserError, match=r"set data\.tokenizer"):
        read_corpus("tokenizer-gpt2")


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    write(tmp_path / "a.txt", "x")
    monkeypatch.setattr(source_files, "file_sha256", refuse)
    with pytest.raises(UserError, match=r"cannot read .*a\.txt: Permission denied"):
        read_corpus(str(tmp_path))


def test_identity_follows_content_ending_and_fields(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    first = read_corpus(str(path)).identity
    assert read_corpus(str(path)).identity == first
    assert read_corpus(str(write(tmp_path / "renamed.txt", "one"))).identity == first
    assert read_corpus(str(write(tmp_path / "a.md", "one"))).identity != first
    assert read_corpus(str(path), fields=("body",)).identity != first
    write(path, "two")
    assert read_corpus(str(path)).identity != first


def test_a_named_data_set_says_where_it_is_from(enter, wheel_source, absent):
    said = []
    enter("tales", absent, wheel_source())
    corpus = read_corpus("tales", say=said.append)
    assert list(corpus.documents()) == ["one fine day", "a dark night"]
    assert corpus.provenance["from"] == "PyPI tales 1.0 (wheel)"
    assert said[-1] == "tales: text of PyPI tales 1.0 (wheel)"


def test_the_datasets_library_reads_a_local_folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", '{"body": "one"}\n{"body": ""}\n{"body": "two"}\n')
    source = f"hf:{tmp_path / 'set'}:train:body"
    corpus = read_corpus(source)
    assert list(corpus.documents()) == ["one", "two"]
    assert corpus.provenance["records"] == 3
    assert read_corpus(source).identity == corpus.identity
    with pytest.raises(UserError, match="has no field 'text'; "):
        read_corpus(f"hf:{tmp_path / 'set'}")
    with pytest.raises(UserError, match=r"data\.source 'hf:.*test"):
        read_corpus(f"hf:{tmp_path / 'set'}:test")
