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
    """Refuse to continue a run on other text or with other tokens than it was begun with.

    The content's hash decides, not its name: a file that moved is the same, and a named data set
    that came from another registry, or a file that was edited, is not.

    Args:
        folder: The run's folder; without a ``data.json`` there is nothing to compare.
        provenance: Of the data that was built now.

    Raises:
        UserError: Naming what was expected and what came.
    """
    path = folder / DATA
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        old, new = _identity(before), _identity(provenance)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not readable, so the run's data cannot be compared; delete it to go on "
            "with the data that the run file names, or set run.dir to a new folder"
        ) from None
    if old != new:
        raise UserError(
            f"{folder} was begun with other data: {_words(before)}; now it is "
            f"{_words(provenance)}. Bring the old data back, or set run.dir to a new folder"
        )


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
