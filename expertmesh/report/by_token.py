"""How much of a layer's routing follows from the tokens' ids, and when it stopped changing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ByToken:
    """First choices on the held-out text, at every evaluation.

    Attributes:
        step: int64, ``(S,)``, increasing.
        guessed: Share of first choices that a token's id tells, from other tokens of its id.
        unguided: Share of them that one expert makes, the layer's most frequent.
        settled: Share of the ids whose favourite expert is the one that it is at the last step.
    """

    step: NDArray[np.int64]
    guessed: Floats
    unguided: Floats
    settled: Floats

    def __len__(self) -> int:
        return len(self.step)


def by_token(layers: Sequence[tuple[int, Mapping[str, Any]]]) -> ByToken:
    """One layer's evaluations out of its entries, by step; those without are left out."""
    seen = [(step, entry["by_token"]) for step, entry in layers if _usable(entry.get("by_token"))]
    final = _favourites(seen[-1][1]) if seen else {}

    def settled(entry: Mapping[str, Any]) -> float:
        now = _favourites(entry)
        both = [now[token] == expert for token, expert in final.items() if token in now]
        return sum(both) / len(both) if both else np.nan

    def column(values: list[float]) -> Floats:
        return np.array(values, dtype=np.float64)

    return ByToken(
        step=np.array([step for step, _ in seen], dtype=np.int64),
        guessed=column([entry["guessed"] for _, entry in seen]),
        unguided=column([entry["unguided"] for _, entry in seen]),
        settled=column([settled(entry) for _, entry in seen]),
    )


def _usable(entry: object) -> bool:
    if not isinstance(entry, Mapping):
        return False
    numbers = all(isinstance(entry.get(key), int | float) for key in ("guessed", "unguided"))
    lists = all(
        isinstance(entry.get(key), list) and all(isinstance(value, int) for value in entry[key])
        for key in ("ids", "favourite")
    )
    return numbers and lists and len(entry["ids"]) == len(entry["favourite"])


def _favourites(entry: Mapping[str, Any]) -> dict[int, int]:
    return dict(zip(entry["ids"], entry["favourite"], strict=True))
