"""What is trained on and what is held out: a function of the text, not of a seed or an order."""

import hashlib
import math
from collections.abc import Callable, Iterator

from expertmesh.errors import UserError

ENOUGH_DOCUMENTS = 100
"""From this many documents on, whole documents are held out."""


def split(
    documents: Callable[[], Iterator[str]], val_fraction: float
) -> tuple[str, Iterator[tuple[str, str]]]:
    """Divide documents into ``train`` and ``val``.

    With at least ``ENOUGH_DOCUMENTS`` different ones, the share of documents whose SHA-256 is
    lowest is held out: the same ones in any order, and copies of a document on the same side. With
    fewer, the end of each document is held out, from the first line that starts at or after ``1 -
    val_fraction`` of its characters (or exactly there if no line does). No character is on both
    sides.

    Args:
        documents: Starts a pass over the text; called up to twice.
        val_fraction: Share to hold out, in ``[0, 1)``.

    Returns:
        How it was done (``none``, ``documents`` or ``tails``), and pairs of part and text.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction must be at least 0 and below 1, got {val_fraction}")
    if val_fraction == 0:
        return "none", (("train", text) for text in documents())
    digests = sorted({_digest(text) for text in documents()})
    if len(digests) < ENOUGH_DOCUMENTS:
        return "tails", _tails(documents(), val_fraction)
    held_out = frozenset(digests[: math.ceil(val_fraction * len(digests))])
    return "documents", (
        ("val" if _digest(text) in held_out else "train", text) for text in documents()
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:12]


def _tails(documents: Iterator[str], val_fraction: float) -> Iterator[tuple[str, str]]:
    for text in documents:
        cut = min(len(text), math.ceil(len(text) * (1 - val_fraction)))
        line_end = text.find("\n", cut - 1)
        if 0 <= line_end < len(text) - 1:
            cut = line_end + 1
        yield "train", text[:cut]
        if text[cut:].strip():
            yield "val", text[cut:]
