"""Named members out of a wheel, an sdist or an npm tarball, and nothing else."""

import shutil
import stat
import tarfile
import zipfile
from collections.abc import Generator, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from expertmesh.errors import UserError


def unpack(archive: Path, patterns: Sequence[str], folder: Path) -> None:
    """Copy the members that match into a folder, under their own paths.

    Only regular files are copied, with no permissions, owners or times of the archive's.

    Args:
        archive: A ``.whl`` or ``.zip``, or a tar with any compression.
        patterns: Shell patterns over the member's whole path; ``*`` crosses ``/``.
        folder: Where to put them; must exist.

    Raises:
        UserError: For a matching member that is a link or would land outside ``folder``, for a
            pattern that matches nothing, and for an unreadable archive.
    """
    unmatched = set(patterns)
    try:
        with closing(_members(archive)) as members:
            for name, is_regular, content in members:
                matching = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
                if not matching:
                    continue
                unmatched -= matching
                if not is_regular or content is None:
                    raise UserError(f"{archive.name}: member {name!r} is a link; it is refused")
                target = folder / _safe(name, archive)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("xb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive.name} is not a readable archive: {error}") from error
    if unmatched:
        raise UserError(f"{archive.name} holds no member like {sorted(unmatched)}")


def _members(archive: Path) -> Generator[tuple[str, bool, IO[bytes] | None], None, None]:
    """Name, whether it is a regular file, and its content, for each member but folders."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    link = stat.S_ISLNK(info.external_attr >> 16)
                    yield info.filename, not link, None if link else wheel.open(info)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.isdir():
                content = tar.extractfile(member) if member.isreg() else None
                yield member.name, member.isreg(), content


def _safe(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
    if outside or not path.parts:
        raise UserError(f"{archive.name}: member {name!r} would land elsewhere; it is refused")
    return path
