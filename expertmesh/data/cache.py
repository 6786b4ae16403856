"""The folder of fetched and derived files: whole or absent, and checked when used."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from expertmesh.errors import UserError

T = TypeVar("T")

MANIFEST = "manifest.json"
# Looks at a folder that other processes take away or make anew meanwhile; one damaged copy costs
# each process one or two.
_LOOKS = 5
# A full disk, no permission, or a file where a folder should be: the user's to mend.
_NO_ROOM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """The cache's folder: ``cache``, or ``EXPERTMESH_CACHE``, or ``~/.cache/expertmesh``."""
    chosen = cache or os.environ.get("EXPERTMESH_CACHE") or "~/.cache/expertmesh"
    return Path(chosen).expanduser()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A temporary folder on the cache's own disk, so that a rename out of it is atomic.

    Raises:
        UserError: If the disk is full or the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".building-", dir=root, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"cannot write the cache {root}: {error.strerror}; "
            "make room there, or set EXPERTMESH_CACHE to another folder"
        ) from error


@contextmanager
def building(final: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill, which then appears under its final name whole, or never.

    The manifest is written last: ``facts``, and the size and SHA-256 of each file. Of two processes
    that build the same folder at once, the first to finish wins and the other's copy is dropped.

    Args:
        final: The folder to make.
        facts: JSON values to store; entries added in the body are stored too.
    """
    with scratch(final.parent) as temporary:
        work = temporary / final.name
        work.mkdir()
        yield work
        manifest = {**facts, "files": _describe(work)}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        try:
            work.rename(final)
        except OSError:
            if not (final / MANIFEST).is_file():
                raise


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in files
    }


def discard(folder: Path) -> None:
    """Remove a cached folder; it leaves its name at once, so that nobody sees half of it."""
    if folder.exists():
        # Another process may have removed it since.
        with scratch(folder.parent) as temporary, suppress(FileNotFoundError):
            folder.rename(temporary / folder.name)
            shutil.rmtree(temporary / folder.name)


def made_once(
    folder: Path,
    load: Callable[[Path], T],
    make: Callable[[], None],
    say: Callable[[str], None],
) -> T:
    """What is in a cached folder, which is made if it is absent, and made anew if it is damaged.

    Any number of processes may do so at once, as the ranks of a run do.

    Args:
        folder: The folder.
        load: Reads it; a UserError means damage.
        make: Makes it with ``building``.
        say: Told of damage.

    Raises:
        UserError: If it is damaged again and again.
    """
    looks = 0
    while True:
        looks += 1
        if not folder.exists():
            make()
        before = _mark(folder)
        try:
            return load(folder)
        except (UserError, FileNotFoundError) as error:
            if looks == _LOOKS:
                raise
            # What another process put there meanwhile is not what was found damaged.
            if before is not None and before == _mark(folder):
                say(str(error))
                discard(folder)


def _mark(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another of its name; None if there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def verified(folder: Path, mend: str) -> dict[str, Any]:
    """The manifest of a cached folder whose files are all as they were stored.

    Args:
        folder: A folder made by ``building``.
        mend: What the user can do when it is not intact; ends the message.

    Raises:
        UserError: Naming the first file that is missing or differs.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is missing or unreadable; {mend}") from error
    for name, expected in files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing from the cache; {mend}")
        if path.stat().st_size != expected["size"] or file_sha256(path) != expected["sha256"]:
            raise UserError(f"{path} is corrupt: its SHA-256 is not the stored one; {mend}")
    return manifest
