"""The files behind a source: of a path, or of a name of the catalog."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from expertmesh.data.cache import file_sha256
from expertmesh.data.catalog import CATALOG
from expertmesh.data.fetch import Say, fetch, say_to_stderr
from expertmesh.data.hub import PREFIX
from expertmesh.data.records import RECORD_READERS, ending
from expertmesh.errors import UserError, nearest

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """Files in the order in which they are read.

    Attributes:
        paths: Where they lie.
        hashes: Relative name -> SHA-256 of the content.
        facts: Where they came from, in JSON values.
        fields: The fields that a named data set is read by; empty for a path.
    """

    paths: list[Path]
    hashes: Mapping[str, str]
    facts: dict[str, Any]
    fields: tuple[str, ...] = ()

    def identity(self, fields: Sequence[str]) -> str:
        """SHA-256 over the content and the fields by which it is read."""
        recipe = json.dumps([sorted(self.hashes.items()), list(fields)])
        return hashlib.sha256(recipe.encode()).hexdigest()


def find_files(
    source: str,
    endings: Sequence[str],
    *,
    cache: str | PathLike[str] | None = None,
    say: Say = say_to_stderr,
) -> SourceFiles:
    """The files that a source names.

    Args:
        source: A file; a folder, of which the files with one of ``endings`` are taken, in the
            order of their relative paths; or a name of the catalog, fetched if need be.
        endings: As ``ending`` gives them.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: If there is no such thing, or a file cannot be read.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _local(path, endings)
    if source in CATALOG:
        return _named(source, cache, say)
    raise UserError(
        f"data.source {source!r} is neither a file, a folder nor a named data set"
        f"{nearest(source, CATALOG)}; `expertmesh data list` shows the names"
    )


def _local(path: Path, endings: Sequence[str]) -> SourceFiles:
    if path.is_file():
        # A single file of an unknown kind is taken for text: the user pointed at it. Its ending
        # says how it is read; the rest of its name says nothing, so a renamed file is the same.
        files = {ending(path): path}
    else:
        found = sorted(p for p in path.rglob("*") if ending(p) in endings and p.is_file())
        files = {p.relative_to(path).as_posix(): p for p in found}
    if not files:
        raise UserError(f"{path} holds no file with one of the endings {', '.join(endings)}")
    try:
        hashes = {name: file_sha256(file) for name, file in files.items()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    paths = list(files.values())
    return SourceFiles(paths=paths, hashes=hashes, facts=_facts(paths, {"source": str(path)}))


def _named(name: str, cache: str | PathLike[str] | None, say: Say) -> SourceFiles:
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
    return SourceFiles(
        paths=paths,
        hashes=fetched.files,
        facts=_facts(paths, facts),
        fields=fetched.source.fields,
    )


def _facts(paths: Sequence[Path], facts: dict[str, Any]) -> dict[str, Any]:
    return {**facts, "files": len(paths), "bytes": sum(path.stat().st_size for path in paths)}


def instruction_source(dataset: str, task_name: str | None = None) -> str:
    """``data.source`` for instruction data that is named as a data set and a task of it.

    Args:
        dataset: A file, a folder or a name of the catalog, which need no task; else a data set of
            the hub in the format of ``yizhongw/self_instruct``.
        task_name: Its configuration, such as ``super_natural_instructions``.

    Raises:
        UserError: If it can only be a path, and nothing is there.
    """
    if dataset.startswith(PREFIX) or dataset in CATALOG or Path(dataset).expanduser().exists():
        return dataset
    # The hub is not asked for what was meant to be here: that takes it half a minute to deny.
    if not _HUB_NAME.fullmatch(dataset) or ending(Path(dataset)) in RECORD_READERS:
        raise UserError(
            f"{dataset!r} is neither a file, a folder, a named data set nor OWNER/NAME of the hub"
            f"{nearest(dataset, CATALOG)}; `expertmesh data list` shows the names"
        )
    return f"{PREFIX}{dataset}@{task_name}" if task_name else f"{PREFIX}{dataset}"
