"""Making sure, before anything is computed, that all ranks are about to do the same."""

import hashlib
from collections.abc import Mapping

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.board import Board

_MOST_NAMES = 8


def same_on_all_ranks(
    facts: Mapping[str, object],
    ranks: Agreement | Board,
    *,
    mistake: str = "the ranks were not started alike",
    remedy: str = "give every host the same run file, overrides, data and version",
) -> None:
    """Compare what the ranks are about to do. Where all is alike they exchange a digest only.

    Args:
        facts: Values by name; anything that can be written out.
        ranks: Those that compare.
        mistake: How the error begins.
        remedy: How it ends.

    Raises:
        UserError: On every rank, naming the facts that differ and which ranks say what.
    """
    own = {name: repr(value) for name, value in facts.items()}
    digest = hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    everyones = ranks.gather(own)
    differing = []
    for name in everyones[0] | {name: "" for other in everyones for name in other}:
        by_value: dict[str, list[int]] = {}
        for rank, told in zip(ranks.ranks, everyones, strict=True):
            by_value.setdefault(told.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            said = "; ".join(
                f"{_ranks(places)} {'say' if len(places) > 1 else 'says'} {value}"
                for value, places in by_value.items()
            )
            differing.append(f"{name}: {said}")
    more = len(differing) - _MOST_NAMES
    tail = f"; and {more} more" if more > 0 else ""
    raise UserError(f"{mistake}. {'; '.join(differing[:_MOST_NAMES])}{tail}; {remedy}")


def _ranks(places: list[int]) -> str:
    if len(places) == 1:
        return f"rank {places[0]}"
    listed = ", ".join(map(str, places[:_MOST_NAMES]))
    return f"ranks {listed}" + (", ..." if len(places) > _MOST_NAMES else "")
