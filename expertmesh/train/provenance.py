"""Which data a run was trained on: ``RUN/data.json``, and the refusal to go on with other data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertmesh.errors import UserError
from expertmesh.train.files import write_whole

DATA = "data.json"


def save_provenance(folder: Path, provenance: Mapping[str, Any]) -> Path:
    """Write what ``DataBundle.provenance`` says into a run's folder."""
    return write_whole(folder / DATA, json.dumps(provenance, indent=1) + "\n")


def check_same_data(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Refuse to continue a run on other text, tokens or held-out share than it was begun with.

    The content's hash decides, not its name: a file that moved is the same, and a named data set
    that came from another registry, or a file that was edited, is not.

    Args:
        folder: The run's folder; without a ``data.json`` there is nothing to compare.
        provenance: Of the data that was built now.

    Raises:
        UserError: Naming what was expected and what came.
    """
    before = _recorded(folder)
    if before is None:
        return
    if words := _difference(folder, before, provenance):
        raise UserError(f"{words}. Bring the old data back, or set run.dir to a new folder")
    now = provenance.get("val_fraction")
    if (then := before.get("val_fraction", now)) != now:
        raise UserError(
            f"data.val_fraction must stay {then}, got {now}: text that {folder} was trained on "
            f"would count as held out; set data.val_fraction = {then}, or run.dir to a new folder"
        )


def check_held_out(folder: Path, provenance: Mapping[str, Any], *, chosen: bool) -> None:
    """Refuse to evaluate a run on text that it was trained on, or on other text unasked.

    A smaller share of the same text is a part of what was held out: see ``data.split``.

    Args:
        folder: The run's folder; without a ``data.json`` there is nothing to compare.
        provenance: Of the data that was built now.
        chosen: Whether the user named the data for this evaluation.

    Raises:
        UserError: Naming what was expected and what came.
    """
    before = _recorded(folder)
    if before is None:
        return
    if not chosen and (words := _difference(folder, before, provenance)):
        raise UserError(
            f"{words}. Bring the old data back, or name what to evaluate on: --data.source=FILE"
        )
    seen = {record["sha256"] for record in before["sources"]}
    is_same = any(record["sha256"] in seen for record in provenance["sources"])
    now = provenance.get("val_fraction", 0.0)
    if is_same and now > (then := before.get("val_fraction", now)):
        raise UserError(
            f"data.val_fraction must be at most {then}, got {now}: {folder} was trained on the "
            "rest of this text; leave it out, or evaluate on other text: --data.source=FILE"
        )


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What ``data.json`` holds, if there is one."""
    path = folder / DATA
    if not path.is_file():
        return None
    try:
        before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _identity(before)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not readable, so the run's data cannot be compared; delete it to go on "
            "with the data that the run file names, or set run.dir to a new folder"
        ) from None
    return before


def _difference(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Both data sets in words, or nothing where they are the same."""
    if _identity(before) == _identity(now):
        return ""
    return f"{folder} was begun with other data: {_words(before)}; now it is {_words(now)}"


def _identity(provenance: Mapping[str, Any]) -> tuple[str, list[str]]:
    hashes = sorted(str(record["sha256"]) for record in provenance["sources"])
    return str(provenance["tokenizer_identity"]), hashes


def _words(provenance: Mapping[str, Any]) -> str:
    sources = [
        f"{record['source']!r}{_origin(record)} with SHA-256 {record['sha256'][:16]}..."
        for record in provenance["sources"]
    ]
    return f"{' and '.join(sources)} in tokens of {provenance['tokenizer']!r}"


def _origin(record: Mapping[str, Any]) -> str:
    return f" from {record['from']}" if "from" in record else ""
