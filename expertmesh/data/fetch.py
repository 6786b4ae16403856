"""A named data set, fetched once: download, check the hash, unpack the named members, remember."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from expertmesh.data.cache import building, cache_root, discard, file_sha256, scratch, verified
from expertmesh.data.catalog import Entry, find
from expertmesh.data.sources import Progress, Source, Unreachable
from expertmesh.data.unpack import unpack
from expertmesh.errors import UserError

Say = Callable[[str], None]


def say_to_stderr(line: str) -> None:
    """The default way to tell a person what happens."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A data set on this disk, its files checked."""

    entry: Entry
    """What was asked for."""
    source: Source
    """The alternative that delivered it."""
    folder: Path
    """Where the members lie."""
    files: dict[str, str]
    """Relative path of each member -> its SHA-256."""


def fetch(
    name: str,
    *,
    cache: str | PathLike[str] | None = None,
    again: bool = False,
    say: Say = say_to_stderr,
) -> Fetched:
    """Get a data set of the catalog, from the cache or from the first source that delivers it.

    A source that is out of reach is passed over for the next one, and ``say`` is told so. An
    archive with the wrong hash is deleted and stops everything: that is not an outage.

    Args:
        name: A name that ``expertmesh data list`` shows.
        cache: Cache folder; None takes ``EXPERTMESH_CACHE`` or ``~/.cache/expertmesh``.
        again: Drop what is cached and fetch it anew.
        say: Called with one line of text for each thing worth telling.

    Raises:
        UserError: For an unknown name, a corrupt cache, a hash mismatch, or when no source
            delivers.
    """
    entry = find(name)
    root = cache_root(cache) / "data"
    cached = None if again else cached_source(entry, cache)
    if cached is not None:
        return _cached(root, entry, cached)
    failures = []
    for source in entry.sources:
        say(f"fetching {entry.name} from {source.where}, {source.size / 1e6:.1f} MB")
        try:
            _download(root, source, again)
        except Unreachable as error:
            failures.append(f"{source.where}: {error}")
            say(f"  not available: {error}")
            continue
        return _cached(root, entry, source)
    raise UserError(
        f"could not fetch {entry.name!r}; tried\n  "
        + "\n  ".join(failures)
        + "\nconnect to a network or set pip's index (PIP_INDEX_URL, PIP_PROXY), "
        "or give a local file or folder instead of the name"
    )


def cached_source(entry: Entry, cache: str | PathLike[str] | None = None) -> Source | None:
    """The first alternative that lies in the cache, unchecked; None if none does."""
    root = cache_root(cache) / "data"
    return next((source for source in entry.sources if _folder(root, source).exists()), None)


def _folder(root: Path, source: Source) -> Path:
    # The whole recipe is in the name, so a later version that keeps other members fetches anew.
    recipe = hashlib.sha256(repr(source).encode()).hexdigest()[:12]
    return root / f"{source.package.strip('@').replace('/', '-')}-{source.version}-{recipe}"


def _cached(root: Path, entry: Entry, source: Source) -> Fetched:
    folder = _folder(root, source)
    manifest = verified(folder, f"run: expertmesh data fetch {entry.name} --again")
    files = {name: facts["sha256"] for name, facts in manifest["files"].items()}
    return Fetched(entry=entry, source=source, folder=folder, files=files)


def _download(root: Path, source: Source, again: bool) -> None:
    final = _folder(root, source)
    facts = {"from": source.where, "archive_sha256": source.sha256}
    with scratch(root) as temporary, building(final, facts) as work:
        with _progress(source) as progress:
            archive = source.download(temporary, progress)
        _check(archive, source)
        unpack(archive, source.keep, work)
        if again:
            discard(final)


def _check(archive: Path, source: Source) -> None:
    got = file_sha256(archive)
    if got != source.sha256:
        archive.unlink()
        raise UserError(
            f"{archive.name} from {source.where} is not the file expected: "
            f"expected SHA-256 {source.sha256}, got {got}; it was deleted and not used. "
            "Check the package index that pip or npm is configured with"
        )


@contextmanager
def _progress(source: Source) -> Iterator[Progress]:
    """A bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Bar(*columns, TransferSpeedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(source.package, total=source.size)
        yield lambda done, total: bar.update(task, completed=done)
