import gzip
import json
import random
import tracemalloc
from itertools import islice

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from expertmesh.data.records import ending, read_records
from expertmesh.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.JSONL", ".jsonl"),
        ("a.b.jsonl.zst", ".jsonl.zst"),
        ("arxiv_02.38.jsonl", ".jsonl"),
        ("README", ""),
        ("a.zst", ".zst"),
    ],
)
def test_endings(tmp_path, name, expected):
    assert ending(tmp_path / name) == expected


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def gzipped(content):
    """The same bytes at any time: gzip would write the clock into its header."""
    return gzip.compress(content, mtime=0)


COMPRESS = {".jsonl": bytes, ".gz": gzipped, ".zst": zstandard.compress}
# A block of a kind that deflate does not have.
DAMAGED = gzipped(b"")[:10] + b"\x07" + bytes(20)
RECORDS = [{"text": "one", "meta": {"url": "u"}}, {"text": "zwei é", "meta": {}}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_lines_in_each_compression(tmp_path, name):
    pack = COMPRESS[(tmp_path / name).suffix]
    # Two frames one after the other are one file.
    (tmp_path / name).write_bytes(pack(lines(RECORDS)) + pack(b"\n" + lines(RECORDS[:1])))
    read = list(read_records(tmp_path / name))
    assert [record for _, record in read] == [*RECORDS, RECORDS[0]]
    assert [where for where, _ in read] == [f"{tmp_path / name}:{n}" for n in (1, 2, 4)]


def test_elements_of_a_list_have_their_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n[ {"a": 1},\n\n {"a":\n 2}, "x"\n]\n')
    assert list(read_records(path)) == [
        (f"{path}:2", {"a": 1}),
        (f"{path}:4", {"a": 2}),
        (f"{path}:5", "x"),
    ]
    path.write_text(" [ ] ")
    assert list(read_records(path)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"a": 1}', r"a\.json: expected a list of records, got '{\"a\": 1}'"),
        ("a.json", b"", r"a\.json: expected a list of records, got ''"),
        ("a.json", b'[{"a": 1},\n{"a": }]', r"a\.json:2 is not JSON"),
        ("a.json", b'[{"a": 1},\n]', r"a\.json:2 is not JSON"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', r"a\.json:2 is not JSON: expected ','"),
        ("a.json", b'[{"a": 1}]\n\nx', r"a\.json:1 is not JSON: expected ',' or the end"),
        ("a.jsonl", b'{"a": 1}\n{', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl.gz", gzipped(b'{"a": 1}\n[')[:-3], r"a\.jsonl\.gz is not a readable gzip"),
        ("a.jsonl.gz", DAMAGED, r"a\.jsonl\.gz is not a readable gzip"),
        ("a.csv", b'text\n"a, b', r"a\.csv is not readable CSV: unexpected end"),
        ("a.csv", b"text\none\ntwo, three\n", r"a\.csv:3 has 2 fields, the header 1"),
        ("a.csv", b"title,text\na,b\nc", r"a\.csv:3 has 1 fields, the header 2"),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz is not a readable gzip"),
        ("a.jsonl.zst", b"plain text", r"a\.jsonl\.zst is not a readable zstd"),
        ("a.jsonl.zst", zstandard.compress(b'\n{"a": '), r"a\.jsonl\.zst:2 is not JSON"),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{}\n"caf\xe9"'),
            r"zst:2 is not UTF-8.*byte 4",
        ),
        ("a.parquet", b"PAR?", r"a\.parquet is not a readable parquet"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_records(tmp_path / name))


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_zstd_file_that_is_cut_short_is_not_taken_for_whole(tmp_path, keep):
    content = lines({"text": str(n * 7919) * 20} for n in range(20_000))
    packed = zstandard.compress(content)
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: int(keep * len(packed))])
    with pytest.raises(UserError, match="ends within a zstd frame"):
        list(read_records(tmp_path / "a.jsonl.zst"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl: No such file"):
        list(read_records(tmp_path / "a.jsonl"))


def test_parquet_columns_that_are_not_asked_for_are_not_read(tmp_path):
    table = {"content": ["x", "y"], "lang": ["C", "D"], "size": [1, 2]}
    parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    read = list(read_records(tmp_path / "a.parquet", ("text", "content")))
    assert [record for _, record in read] == [
        {"content": "x", "lang": None, "size": None},
        {"content": "y", "lang": None, "size": None},
    ]
    assert [where[-8:] for where, _ in read] == ["record 1", "record 2"]
    (first, _) = read_records(tmp_path / "a.parquet")
    assert first[1] == {"content": "x", "lang": "C", "size": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_is_read_as_a_stream(tmp_path, name):
    draw = random.Random(0)
    records = [{"text": draw.randbytes(800).hex()} for _ in range(6000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=100)
    else:
        path.write_bytes(COMPRESS[path.suffix](lines(records)))
    del records
    list(islice(read_records(path), 2))
    before, held = pyarrow.total_allocated_bytes(), 0
    tracemalloc.start()
    for _ in read_records(path, ("text",)):
        held = max(held, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1] + held
    tracemalloc.stop()
    assert peak < 0.3 * 6000 * 1600


def test_csv_rows_are_as_long_as_the_header(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('title,text\na,"b, ""c""\nd"\n\ne,\nf,g,\n')
    assert [record for _, record in read_records(path)] == [
        {"title": "a", "text": 'b, "c"\nd'},
        {"title": "e", "text": ""},
        {"title": "f", "text": "g"},
    ]
