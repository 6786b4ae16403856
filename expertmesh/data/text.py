"""Documents out of files, named data sets and the Hugging Face hub's ``datasets``."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from expertmesh.data.cache import file_sha256
from expertmesh.data.catalog import CATALOG
from expertmesh.data.fetch import Say, fetch, say_to_stderr
from expertmesh.errors import UserError, nearest, require

# One CSV field may be a whole book; Python's own limit is 128 KiB.
_CSV_FIELD = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents that can be read any number of times, always the same."""

    documents: Callable[[], Iterator[str]]
    """Starts a new pass; documents without any text are left out."""
    identity: str
    """SHA-256 over the content and the way in which it is read."""
    provenance: dict[str, Any]
    """Where the text came from, in JSON values: what a run records."""


def read_corpus(
    source: str,
    *,
    fields: Sequence[str] = ("text",),
    cache: str | PathLike[str] | None = None,
    say: Say = say_to_stderr,
) -> Corpus:
    """Find the text that a run file names.

    Args:
        source: A file or folder; a name of the catalog (fetched if need be); or
            ``hf:NAME[@CONFIG][:SPLIT[:FIELD]]`` for ``datasets.load_dataset``.
        fields: Keys or columns that make a document of a record (jsonl, json, csv, parquet), joined
            by line breaks. A named data set has its own.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: If nothing is there, or it cannot be read, naming the path.
    """
    if source.startswith("hf:"):
        return _hub(source, tuple(fields))
    path = Path(source).expanduser()
    if path.exists():
        return _local(path, tuple(fields))
    if source in CATALOG:
        return _named(source, cache, say)
    raise UserError(
        f"data.source {source!r} is neither a file, a folder nor a named data set"
        f"{nearest(source, CATALOG)}; `expertmesh data list` shows the names"
    )


def _local(path: Path, fields: tuple[str, ...]) -> Corpus:
    if path.is_file():
        # A single file of an unknown kind is taken for text: the user pointed at it. Its ending
        # says how it is read; the rest of its name says nothing, so a renamed file is the same.
        files = {path.suffix.lower(): path}
    else:
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in _READERS and p.is_file())
        files = {p.relative_to(path).as_posix(): p for p in found}
    if not files:
        raise UserError(f"{path} holds no file with one of the endings {', '.join(_READERS)}")
    try:
        hashes = {name: file_sha256(file) for name, file in files.items()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return _corpus(list(files.values()), hashes, fields, {"source": str(path)})


def _named(name: str, cache: str | PathLike[str] | None, say: Say) -> Corpus:
    if CATALOG[name].kind != "text":
        raise UserError(f"{name!r} is a tokenizer, not text; set data.tokenizer to it instead")
    fetched = fetch(name, cache=cache, say=say)
    if len(fetched.entry.sources) > 1:
        say(f"{name}: text of {fetched.source.where}")
    paths = [fetched.folder / file for file in fetched.files]
    facts = {
        "source": name,
        "from": fetched.source.where,
        "archive_sha256": fetched.source.sha256,
        "licence": fetched.entry.licence,
    }
    return _corpus(paths, fetched.files, fetched.source.fields, facts)


def _corpus(
    paths: list[Path], hashes: Mapping[str, str], fields: tuple[str, ...], facts: dict[str, Any]
) -> Corpus:
    def documents() -> Iterator[str]:
        for path in paths:
            yield from (text for text in read_file(path, fields) if text.strip())

    recipe = json.dumps([sorted(hashes.items()), fields])
    identity = hashlib.sha256(recipe.encode()).hexdigest()
    size = sum(path.stat().st_size for path in paths)
    provenance = {**facts, "files": len(paths), "bytes": size, "sha256": identity}
    return Corpus(documents=documents, identity=identity, provenance=provenance)


def read_file(path: Path, fields: tuple[str, ...] = ("text",)) -> Iterator[str]:
    """The documents of one file, by its ending; an unknown one is read as plain text.

    Raises:
        UserError: If it cannot be read as what it claims to be; names the path and the line.
    """
    reader = _READERS.get(path.suffix.lower(), _read_text)
    try:
        yield from reader(path, fields)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; convert it first"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _read_text(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    yield path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _join(_parse(line, f"{path}:{number}"), fields, f"{path}:{number}")


def _read_json(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    records = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of records, got {type(records).__name__}")
    for number, record in enumerate(records):
        yield _join(record, fields, f"{path}: record {number}")


def _read_csv(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    before = csv.field_size_limit(_CSV_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            for record in reader:
                yield _join(record, fields, f"{path}:{reader.line_num}")
    except csv.Error as error:
        raise UserError(f"{path} is not readable CSV: {error}") from error
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path, fields: tuple[str, ...]) -> Iterator[str]:
    parquet = require("pyarrow.parquet", extra="hf")
    arrow = require("pyarrow", extra="hf")
    try:
        with parquet.ParquetFile(path) as file:
            columns = [field for field in fields if field in file.schema_arrow.names]
            if len(columns) < len(fields):
                _join(dict.fromkeys(file.schema_arrow.names, ""), fields, str(path))
            for batch in file.iter_batches(columns=columns):
                for record in batch.to_pylist():
                    yield _join(record, fields, str(path))
    except arrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[str]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def _join(record: Any, fields: tuple[str, ...], where: str) -> str:
    """The record's fields as one text; an empty one leaves no blank line."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected an object with {list(fields)}, got {record!r:.40}")
    for field in fields:
        if field not in record:
            raise UserError(
                f"{where} has no field {field!r}{nearest(field, map(str, record))}; "
                f"set data.fields to some of {list(record)}"
            )
        if not isinstance(record[field], str | None):
            raise UserError(f"{where}: field {field!r} is not text but {record[field]!r:.40}")
    return "\n".join(record[field] for field in fields if record[field])


def _hub(source: str, fields: tuple[str, ...]) -> Corpus:
    """``hf:NAME[@CONFIG][:SPLIT[:FIELD]]``; NAME may be a local folder."""
    name, split, field = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    name, _, config = name.partition("@")
    if not name:
        raise UserError(f"data.source {source!r} names no data set; write hf:NAME")
    split = split or "train"
    chosen = (field,) if field else fields
    datasets = require("datasets", extra="hf")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    # The library raises dozens of unrelated kinds: of the network, of the hub, of the files.
    except Exception as error:
        raise UserError(f"data.source {source!r}: {error}") from error

    def documents() -> Iterator[str]:
        for number, record in enumerate(table):
            text = _join(record, chosen, f"{source}: record {number}")
            if text.strip():
                yield text

    identity = _content_sha256(documents())
    facts = {"source": source, "split": split, "records": len(table), "sha256": identity}
    return Corpus(documents=documents, identity=identity, provenance=facts)


def _content_sha256(documents: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        encoded = text.encode("utf-8", errors="replace")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
