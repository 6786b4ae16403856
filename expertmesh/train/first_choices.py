"""How much of the routing follows from the token's id alone, and which expert each id prefers."""

from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.parallel.agreement import Agreement
from expertmesh.routing import Router, Routing
from expertmesh.train.routings import EveryRouting

MOST_IDS = 256
"""Token ids whose favourite expert is written down: the most frequent ones."""


class FirstChoices(EveryRouting):
    """A context that counts which expert is the first choice of tokens, by the tokens' ids.

    Choices count as routers make them, before any is dropped; padding has none.

    Args:
        model: Run inside the context; gives its routers the tokens' ids.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        # By layer: E, and for each pair id * E + expert that was seen, how often.
        self._seen: dict[str, tuple[int, Tensor, Tensor]] = {}

    def add_other_ranks(self, ranks: Agreement) -> None:
        """Add what other ranks counted, of these layers and of others; all ranks call it."""
        own, self._seen = self._seen, {}
        for part in ranks.gather(own):
            for name, (num_experts, pairs, counts) in part.items():
                self._add(name, num_experts, pairs, counts)

    def statistics(self) -> dict[str, dict[str, Any]]:
        """For each layer that saw tokens, what ``routing.jsonl`` has under ``by_token``.

        - ``guessed``: of the tokens whose id occurs at least twice, the share whose first choice is
          the one that the other tokens of their id make most often. A tie guesses nothing.
        - ``unguided``: the share of the same tokens that make the layer's most frequent choice.
        - ``ids``, ``favourite``: the most frequent ids, at most 256 of those, by their number, and
          each one's most frequent first choice.
        """
        return {
            name: _statistics(_table(*seen)) for name, seen in self._seen.items() if len(seen[1])
        }

    def _begin(self, name: str, router: Router) -> None:
        none = torch.zeros(0, dtype=torch.int64)
        self._seen[name] = (router.num_experts, none, none)

    def _see(self, name: str, ids_T: Tensor, routing: Routing) -> None:
        E, first_T = routing.num_experts, routing.chosen_TK[:, 0]
        pairs = (ids_T * E + first_T)[first_T < E].cpu()
        self._add(name, E, *pairs.unique(return_counts=True))

    def _add(self, name: str, num_experts: int, pairs: Tensor, counts: Tensor) -> None:
        _, old_pairs, old_counts = self._seen.get(name, (num_experts, pairs[:0], counts[:0]))
        merged, place = torch.cat([old_pairs, pairs]).unique(return_inverse=True)
        both = torch.cat([old_counts, counts])
        total = torch.zeros_like(merged).scatter_add_(0, place, both)
        self._seen[name] = (num_experts, merged, total)


def _table(num_experts: int, pairs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Ids in increasing order, and how often each took each expert, ``(ids, E)``."""
    ids_I, row = (pairs // num_experts).unique(return_inverse=True)
    count_IE = torch.zeros(len(ids_I), num_experts, dtype=torch.int64)
    count_IE[row, pairs % num_experts] = counts
    return ids_I, count_IE


def _statistics(table: tuple[Tensor, Tensor]) -> dict[str, Any]:
    ids_I, count_IE = table
    total_I = count_IE.sum(dim=1)
    ids_I, count_IE, total_I = (x[total_I >= 2] for x in (ids_I, count_IE, total_I))
    if len(ids_I) == 0:
        return {"guessed": None, "unguided": None, "ids": [], "favourite": []}
    best = count_IE.sort(dim=1, descending=True, stable=True)
    runner_up_I = best.values[:, 1] if count_IE.shape[1] > 1 else torch.zeros_like(total_I)
    most_I = best.values[:, 0]
    # A token of the favourite is guessed if the favourite leads without it.
    guessed = most_I[most_I - 1 > runner_up_I].sum() / total_I.sum()
    unguided = count_IE.sum(dim=0).max() / total_I.sum()
    chosen = total_I.argsort(descending=True, stable=True)[:MOST_IDS].sort().values
    return {
        "guessed": float(guessed),
        "unguided": float(unguided),
        "ids": ids_I[chosen].tolist(),
        "favourite": best.indices[chosen, 0].tolist(),
    }
