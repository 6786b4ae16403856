"""Making sure, before anything is computed, that all ranks are about to do the same."""

from collections.abc import Mapping

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement

_MOST_NAMES = 8


def same_on_all_ranks(facts: Mapping[str, object], ranks: Agreement) -> None:
    """Compare what the ranks are about to do.

    Args:
        facts: Values by name; anything that can be written out.
        ranks: Those that compare.

    Raises:
        UserError: On every rank, naming the facts that differ and which ranks say what.
    """
    everyones = ranks.gather({name: repr(value) for name, value in facts.items()})
    differing = []
    for name in everyones[0] | {name: "" for other in everyones for name in other}:
        by_value: dict[str, list[int]] = {}
        for rank, own in enumerate(everyones):
            by_value.setdefault(own.get(name, "nothing"), []).append(rank)
        if len(by_value) > 1:
            said = "; ".join(
                f"{_ranks(places)} {'say' if len(places) > 1 else 'says'} {value}"
                for value, places in by_value.items()
            )
            differing.append(f"{name}: {said}")
    if differing:
        more = len(differing) - _MOST_NAMES
        tail = f"; and {more} more" if more > 0 else ""
        raise UserError(
            "the ranks were not started alike. "
            + "; ".join(differing[:_MOST_NAMES])
            + tail
            + "; give every host the same run file, overrides, data and version"
        )


def _ranks(places: list[int]) -> str:
    if len(places) == 1:
        return f"rank {places[0]}"
    listed = ", ".join(map(str, places[:_MOST_NAMES]))
    return f"ranks {listed}" + (", ..." if len(places) > _MOST_NAMES else "")
