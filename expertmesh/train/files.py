"""Small text files that are whole or absent."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a file under another name and rename it, so that a crash leaves the old one.

    Args:
        path: The file; its folder is made if absent.
        text: Its content.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
    return path
