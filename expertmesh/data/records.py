"""Records out of files: an object a line, a list, a table; as a stream wherever one can be read."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from expertmesh.errors import UserError, require

Records = Iterator[tuple[str, Any]]
"""Where a record is from, in words, and the record."""

# One CSV field may be a whole book; Python's own limit is 128 KiB.
_CSV_FIELD = 1 << 30
# Documents of a few kB to 1 MB: a batch stays small beside a parquet file's row group.
_PARQUET_ROWS = 128
_CHUNK = 1 << 16
_COMPRESSED = (".gz", ".zst")


def ending(path: Path) -> str:
    """What says how a file is read: ``.jsonl``, or ``.jsonl.zst`` with its compression."""
    last = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if last in _COMPRESSED else last


def read_records(path: Path, columns: Sequence[str] = ()) -> Records:
    """The records of one file, by its ending (a key of ``RECORD_READERS``).

    Memory does not grow with the file, except for ``.json``, which is parsed from one text, and
    for the largest record.

    Args:
        path: The file.
        columns: Those that will be looked at; a parquet file's others are not read. Empty: all.

    Raises:
        UserError: If it cannot be read as what it claims to be; names the path and the line.
    """
    try:
        yield from RECORD_READERS[ending(path)](path, columns)
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def not_utf8(where: Path | str, error: UnicodeDecodeError) -> UserError:
    """What to tell of a file, or a line of it, in another encoding."""
    return UserError(
        f"{where} is not UTF-8 text: {error.reason} at byte {error.start}; convert it first"
    )


def _json_lines(path: Path, columns: Sequence[str]) -> Records:
    with path.open("rb") as lines:
        yield from _parsed_lines(lines, path)


def _json_lines_gzip(path: Path, columns: Sequence[str]) -> Records:
    with gzip.open(path, "rb") as lines:
        yield from _parsed_lines(lines, path)


def _json_lines_zstd(path: Path, columns: Sequence[str]) -> Records:
    zstandard = require("zstandard", extra="hf")
    try:
        with path.open("rb") as file:
            yield from _parsed_lines(_zstd_lines(file, zstandard, path), path)
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a readable zstd file: {error}") from error


def _zstd_lines(file: BinaryIO, zstandard: ModuleType, path: Path) -> Iterator[bytes]:
    """Lines of a file of zstd frames; the library's own reader takes a file cut short silently."""
    # Files made with --long need a window of up to 2 GiB; the library's own limit is 128 MiB.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, begun, rest = decompressor.decompressobj(), False, b""
    while packed := file.read(_CHUNK):
        while packed:
            *lines, rest = (rest + frame.decompress(packed)).split(b"\n")
            yield from lines
            packed, begun = frame.unused_data, not frame.eof
            if frame.eof:
                frame = decompressor.decompressobj()
    if begun:
        raise UserError(f"{path} ends within a zstd frame: it was cut short; fetch it again")
    yield rest


def _parsed_lines(lines: Iterable[bytes], path: Path) -> Records:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig")
            record = json.loads(text) if text.strip() else None
        except UnicodeDecodeError as error:
            raise not_utf8(where, error) from error
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if text.strip():
            yield where, record


def _json_list(path: Path, columns: Sequence[str]) -> Records:
    """A list's elements one by one, so that each has the line on which it begins."""
    text = path.read_text(encoding="utf-8-sig")
    place = _skip_space(text, 0)
    if text[place : place + 1] != "[":
        raise UserError(f"{path}: expected a list of records, got {text[place:][:20]!r}")
    decoder = json.JSONDecoder()
    line, counted, separator = 1, 0, ","
    place = _skip_space(text, place + 1)
    if text[place : place + 1] == "]":
        separator, place = "]", place + 1
    while separator == ",":
        place = _skip_space(text, place)
        line, counted = line + text.count("\n", counted, place), place
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno} is not JSON: {error}") from error
        yield f"{path}:{line}", record
        place = _skip_space(text, place)
        separator, place = text[place : place + 1], place + 1
    if separator != "]" or text[place:].strip():
        line = 1 + text.count("\n", 0, place)
        raise UserError(f"{path}:{line} is not JSON: expected ',' or the end of the list")


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _csv(path: Path, columns: Sequence[str]) -> Records:
    before = csv.field_size_limit(_CSV_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            # Otherwise a file that ends within quotation marks is taken for whole.
            reader = csv.DictReader(lines, strict=True)
            for record in reader:
                where = f"{path}:{reader.line_num}"
                _check_width(record, reader.fieldnames or (), where)
                yield where, record
    except csv.Error as error:
        raise UserError(f"{path} is not readable CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _check_width(record: dict[Any, Any], names: Sequence[str], where: str) -> None:
    """Raise if a row is not as long as the header; what is beyond it would be lost."""
    beyond = record.pop(None, [])
    given = len(beyond) + sum(value is not None for value in record.values())
    if any(beyond) or None in record.values():
        raise UserError(
            f"{where} has {given} fields, the header {len(names)}; put a text that holds commas "
            "or line breaks between quotation marks"
        )


def _parquet(path: Path, columns: Sequence[str]) -> Records:
    parquet = require("pyarrow.parquet", extra="hf")
    arrow = require("pyarrow", extra="hf")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            chosen = [name for name in names if name in columns] or names
            # A record shows the columns that were not read too, for the sake of messages.
            unread = dict.fromkeys(name for name in names if name not in chosen)
            number = 0
            # One group at a time: the library would hold those that it has passed.
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_PARQUET_ROWS, [group], chosen):
                    for record in batch.to_pylist():
                        number += 1
                        yield f"{path}: record {number}", {**record, **unread}
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error


RECORD_READERS: dict[str, Callable[[Path, Sequence[str]], Records]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines_gzip,
    ".jsonl.zst": _json_lines_zstd,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""How each kind of file is read, by its ending."""
