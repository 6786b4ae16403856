"""What is trained on and what is held out: a function of the text, not of a seed or an order."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from expertmesh.data.decimals import as_written
from expertmesh.errors import UserError

ENOUGH_DOCUMENTS = 100
"""From this many documents on, whole documents are held out."""
# So many hashes are kept to count out the share exactly; beyond, hashes' even spread does it.
_EXACT_DOCUMENTS = 200_000
_DIGEST_BYTES = 12


def split(
    documents: Callable[[], Iterator[str]], val_fraction: float
) -> tuple[str, Iterator[tuple[str, str]]]:
    """Divide documents into ``train`` and ``val``.

    With at least ``ENOUGH_DOCUMENTS`` different ones, the share of documents whose SHA-256 is
    lowest is held out (see ``HeldOut``). With fewer, the end of each document is held out, from the
    first line that starts at or after ``1 - val_fraction`` of its characters (or exactly there if
    no line does). No character is on both sides.

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
    held_out = HeldOut.of(documents(), val_fraction)
    if held_out.num_texts < ENOUGH_DOCUMENTS:
        return "tails", _tails(documents(), val_fraction)
    return "documents", (("val" if text in held_out else "train", text) for text in documents())


@dataclass(frozen=True)
class HeldOut:
    """Which texts are held out: those with the lowest SHA-256.

    So they are the same in any order, and copies of a text stay on one side. Of up to 200,000
    different texts the share is exact, rounded up; of more it is that of evenly spread hashes, so
    that memory does not grow with the text.

    Attributes:
        num_texts: Different texts that were looked at.
        limit: Digests up to this one are held out.
    """

    num_texts: int
    limit: bytes

    @staticmethod
    def of(texts: Iterable[str], share: float) -> "HeldOut":
        """The rule for a collection of texts, read once at most."""
        digests = set()
        for text in texts:
            digests.add(_digest(text))
            if len(digests) > _EXACT_DOCUMENTS:
                limit = int(share * (1 << 8 * _DIGEST_BYTES))
                return HeldOut(len(digests), limit.to_bytes(_DIGEST_BYTES, "big"))
        count = math.ceil(as_written(share) * len(digests))
        return HeldOut(len(digests), sorted(digests)[count - 1] if count else b"")

    def __contains__(self, text: str) -> bool:
        return _digest(text) <= self.limit


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:_DIGEST_BYTES]


def _tails(documents: Iterator[str], val_fraction: float) -> Iterator[tuple[str, str]]:
    for text in documents:
        cut = min(len(text), math.ceil(len(text) * (1 - as_written(val_fraction))))
        line_end = text.find("\n", cut - 1)
        if 0 <= line_end < len(text) - 1:
            cut = line_end + 1
        yield "train", text[:cut]
        if text[cut:].strip():
            yield "val", text[cut:]
