"""Word that ranks leave for each other where they joined, before they have any connection."""

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

T = TypeVar("T")


class Board:
    """Some ranks of the world that tell each other a few words by the store of the process group.

    An ``Agreement`` makes connections of its own, and hears at once of a rank that is gone. This is
    for word so short and so early that connections would cost more than it does.

    Args:
        name: What its ranks call it, and no other board.
        ranks: Their numbers in the world.
        timeout: After which a rank that waits for another gives up; None is torch's default.
    """

    def __init__(self, name: str, ranks: Sequence[int], timeout: timedelta | None = None) -> None:
        self.ranks = tuple(ranks)
        self._name = name
        self._timeout = timeout or default_pg_timeout
        self._rounds = 0

    def gather(self, value: T) -> list[T]:
        """What ``value`` is on every rank, by place; of what JSON can write.

        Raises:
            RuntimeError: If another rank did not come in time, naming it.
        """
        self._rounds += 1
        # Ranks that are pretended say what this one does.
        if dist.get_backend() == "fake":
            return [value] * len(self.ranks)
        prefix = f"expertmesh/{self._name}/{len(self.ranks)}/{self._rounds}"
        store = dist.PrefixStore(prefix, _get_default_store())
        store.set(str(dist.get_rank()), json.dumps(value))
        keys = [str(rank) for rank in self.ranks]
        try:
            store.wait(keys, self._timeout)
        except RuntimeError as error:  # stores differ in what they raise
            missing = [key for key in keys if not store.check([key])]
            raise RuntimeError(
                f"rank {', '.join(missing)} did not come within {self._timeout.total_seconds():g} "
                f"s to where rank {dist.get_rank()} waits ({self._name}); see what it said, and "
                "whether every rank makes the same calls in the same order"
            ) from error
        return [json.loads(text) for text in store.multi_get(keys)]
