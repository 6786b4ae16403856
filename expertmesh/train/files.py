"""Small text files that are whole or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a file under another name and rename it, so that a crash leaves the old one.

    Args:
        path: The file; its folder is made if absent.
        text: Its content.

    Returns:
        ``path``.

    Raises:
        OSError: If the disk is full, naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with full_disk_named(path):
        unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Let writing that fails name the file and what to do; the system names it in opening only.

    Raises:
        OSError: In place of the system's.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}; make room there and start the same command again, which goes on "
            "after the last checkpoint",
            str(path),
        ) from error
