"""Ranks that do something together: it is done on all of them, or fails alike on all of them."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_default_store

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError

T = TypeVar("T")

# A message about many ranks stops here; the rest is counted.
_MOST_REPORTS = 4


class _Report(NamedTuple):
    text: str
    by_user: bool


class Agreement:
    """Some ranks that must agree, seen from one of them.

    They talk over connections of their own, made when first needed, so that a thread may use them
    while the training uses the others. Agreements over a group are made, and the methods of each
    are called, by all its ranks in the same order; ranks outside it take no part.

    Args:
        group: The ranks; None is this process alone, which agrees with itself.
    """

    def __init__(self, group: Group | None = None) -> None:
        self._group = Group.alone() if group is None else group
        self._number = next(self._group.agreements)
        self._connections: dist.ProcessGroupGloo | None = None

    @property
    def index(self) -> int:
        """This rank's place among them."""
        return self._group.index

    @property
    def ranks(self) -> tuple[int, ...]:
        """Their numbers in the world."""
        return self._group.ranks

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._group.size

    @property
    def first(self) -> bool:
        """Whether this rank does what one rank must do for all."""
        return self._group.index == 0

    def gather(self, value: T) -> list[T]:
        """What ``value`` is on every rank, by place.

        Raises:
            RuntimeError: If another rank is gone, or did not come in time.
        """
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        try:
            sizes = self._gather(torch.tensor([len(own)]))
            longest = int(torch.stack(sizes).max())
            rows = self._gather(torch.cat([own, own.new_zeros(longest - len(own))]))
        except RuntimeError as error:
            raise RuntimeError(
                f"the ranks lost each other ({error}): one of them has ended, or was waited for "
                "longer than mesh.timeout; see what it said, or set mesh.timeout higher"
            ) from error
        return [pickle.loads(bytes(row.numpy())) for row in rows]  # reads no further than it must

    def _gather(self, own: Tensor) -> list[Tensor]:
        """One tensor of each rank, all of one shape."""
        if self._connections is None:
            self._connections = self._connect()
        everyones = [torch.empty_like(own) for _ in range(self.size)]
        self._connections.allgather([everyones], [own]).wait()  # type: ignore[attr-defined]  # has it
        return everyones

    def _connect(self) -> "dist.ProcessGroupGloo":
        """Connections between these ranks.

        Not ``dist.new_group``: it takes all ranks of the world, or names the group by the number of
        groups that a rank is in already, which differs between ranks of meshes that overlap.
        """
        name = f"expertmesh/agreement/{self._group.name}/{self._number}"
        store = dist.PrefixStore(name, _get_default_store())
        timeout = self._group.timeout or default_pg_timeout
        return dist.ProcessGroupGloo(store, self.index, self.size, timeout)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; raise on all of them if it raised on one.

        The block must not wait for other ranks: one that failed never comes.

        Raises:
            UserError: The same on every rank, naming those that failed, if each failure was a
                user's mistake, a file that cannot be used, or the system's refusal.
            RuntimeError: If one failed in any other way: on every rank too, but where no failure
                was of the first kinds, those that failed raise their own errors.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        reports = self.gather(None if own is None else _report(own))
        failed = {
            rank: report
            for rank, report in zip(self._group.ranks, reports, strict=True)
            if report is not None
        }
        if not failed:
            return
        by_user = {report.by_user for report in failed.values()}
        if by_user == {True}:
            raise UserError(self._joined(failed)) from own
        if by_user == {False} and own is not None:
            raise own
        # A UserError is taken to be the same everywhere, so none may be raised on some ranks.
        raise RuntimeError(self._joined(failed)) from own

    def _joined(self, failed: dict[int, _Report]) -> str:
        ranks_of: dict[str, list[int]] = {}
        for rank, report in failed.items():
            ranks_of.setdefault(report.text, []).append(rank)
        if len(failed) == self.size and len(ranks_of) == 1:
            return next(iter(ranks_of))
        lines = [f"{_named(ranks)}: {text}" for text, ranks in ranks_of.items()]
        rest = len(lines) - _MOST_REPORTS
        return "; ".join(lines[:_MOST_REPORTS]) + (f"; and {rest} more" if rest > 0 else "")


def _report(error: Exception) -> _Report:
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        return _Report(where + error.strerror, True)
    if isinstance(error, UserError | OSError | SafetensorError):
        return _Report(str(error), True)
    return _Report(f"{type(error).__name__}: {error}", False)


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
