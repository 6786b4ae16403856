"""Documents out of files, named data sets and the Hugging Face hub's ``datasets``."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from expertmesh.data.catalog import CATALOG
from expertmesh.data.fetch import Say, say_to_stderr
from expertmesh.data.hub import PREFIX, HubSource
from expertmesh.data.records import RECORD_READERS, ending, not_utf8, read_records
from expertmesh.data.source_files import SourceFiles, find_files
from expertmesh.errors import UserError, nearest

_TEXT_ENDINGS = (".txt", ".md")
_USUAL_FIELDS = ("text", "content")


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
    fields: Sequence[str] = (),
    cache: str | PathLike[str] | None = None,
    say: Say = say_to_stderr,
) -> Corpus:
    """Find the text that a run file names.

    Args:
        source: A file or folder; a name of the catalog (fetched if need be); or
            ``hf:NAME[@CONFIG][:SPLIT[:FIELD]]`` for ``datasets.load_dataset``.
        fields: Keys or columns that make a document of a record (jsonl, json, csv, parquet), joined
            by line breaks. None: ``text``, or ``content`` where there is no ``text`` (RedPajama
            and The Stack). A named data set has its own.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: If nothing is there, or it cannot be read, naming the path.
    """
    if source.startswith(PREFIX):
        return _hub(source, tuple(fields))
    files = find_files(source, (*_TEXT_ENDINGS, *RECORD_READERS), cache=cache, say=say)
    return _corpus(files, files.fields or tuple(fields))


def check_fields(sources: Sequence[str], fields: Sequence[str]) -> None:
    """Refuse fields by which no source is read; in a mixture they are of those that have records.

    Raises:
        UserError: Says what has them.
    """
    if fields and not any(map(_takes_fields, sources)):
        raise UserError(
            "data.fields is for files of records, folders of them and hf:NAME, got "
            f"{list(fields)} for {', '.join(map(repr, sources))}; leave it out"
        )


def _takes_fields(source: str) -> bool:
    """Whether a source is there and has records without fields of their own."""
    if source.startswith(PREFIX):
        return not HubSource.parse(source).field
    path = Path(source).expanduser()
    if path.is_dir():
        return any(ending(file) in RECORD_READERS for file in path.rglob("*"))
    # What is nowhere to be found is told by who reads it.
    return ending(path) in RECORD_READERS if path.exists() else source not in CATALOG


def _corpus(files: SourceFiles, fields: tuple[str, ...]) -> Corpus:
    def documents() -> Iterator[str]:
        for path in files.paths:
            yield from (text for text in read_file(path, fields) if text.strip())

    identity = files.identity(fields or _USUAL_FIELDS[:1])
    return Corpus(
        documents=documents,
        identity=identity,
        provenance={**files.facts, "sha256": identity},
    )


def read_file(path: Path, fields: tuple[str, ...] = ()) -> Iterator[str]:
    """The documents of one file, by its ending; an unknown one is read as plain text.

    Raises:
        UserError: If it cannot be read as what it claims to be; names the path and the line.
    """
    if ending(path) in RECORD_READERS:
        for where, record in read_records(path, fields or _USUAL_FIELDS):
            yield _join(record, fields, where)
        return
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _join(record: Any, fields: tuple[str, ...], where: str) -> str:
    """The record's fields as one text; an empty one leaves no blank line."""
    if not isinstance(record, Mapping):
        wanted = list(fields or _USUAL_FIELDS[:1])
        raise UserError(f"{where}: expected an object with {wanted}, got {record!r:.40}")
    chosen = fields or [name for name in _USUAL_FIELDS if name in record][:1] or _USUAL_FIELDS[:1]
    for field in chosen:
        if field not in record:
            raise UserError(
                f"{where} has no field {field!r}{nearest(field, map(str, record))}; "
                f"set data.fields to some of {list(record)}"
            )
        if not isinstance(record[field], str | None):
            raise UserError(f"{where}: field {field!r} is not text but {record[field]!r:.40}")
    return "\n".join(record[field] for field in chosen if record[field])


def _hub(source: str, fields: tuple[str, ...]) -> Corpus:
    parts = HubSource.parse(source)
    chosen = (parts.field,) if parts.field else fields
    table = parts.load()

    def documents() -> Iterator[str]:
        for number, record in enumerate(table):
            text = _join(record, chosen, f"{source}: record {number}")
            if text.strip():
                yield text

    identity = content_sha256(documents())
    facts = {"source": source, "split": parts.split, "records": len(table), "sha256": identity}
    return Corpus(documents=documents, identity=identity, provenance=facts)


def content_sha256(documents: Iterable[str]) -> str:
    """SHA-256 over texts and where each ends."""
    digest = hashlib.sha256()
    for text in documents:
        encoded = text.encode("utf-8", errors="replace")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
