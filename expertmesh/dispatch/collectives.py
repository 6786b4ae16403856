"""Differentiable collectives whose sizes are known on the host, and a count of what they send.

Parts may be uneven and empty. Every function is its own definition on a group of one rank: it
returns its input. Sums over ranks run in a fixed order where the order is ours (``all_to_all``,
``all_gather``); those of all-reduce and reduce-scatter are the library's.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Newer torch calls them so, and warns where the older names are used.
_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Traffic:
    """Bytes that left this rank, by kind of collective.

    Attributes:
        bytes_sent: For ``"all_to_all"`` and the like, and for the numbers that ranks tell each
            other beforehand (``"counts"``, ``"sizes"``); not what a rank keeps to itself. Of an
            all-reduce and a reduce-scatter the size that a ring sends is counted.
    """

    bytes_sent: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, num_bytes: int) -> None:
        """Count what was sent."""
        self.bytes_sent[kind] += num_bytes


@dataclass(frozen=True, eq=False)
class Group:
    """Some ranks that communicate, seen from one of them.

    Attributes:
        ranks: Their numbers in the world, in the group's order.
        index: This rank's place among them.
        process_group: torch's; None for a single rank.
        device_type: Where tensors must be to be sent.
        timeout: After which a rank that waits for another gives up; None is torch's default.
        name: What its ranks call it, and no other group.
        traffic: What this rank sent over this group.
        agreements: Numbers what the ranks make to agree with each other.
    """

    ranks: tuple[int, ...]
    index: int
    process_group: dist.ProcessGroup | None
    device_type: str = "cpu"
    timeout: timedelta | None = None
    name: str = ""
    traffic: Traffic = field(default_factory=Traffic)
    agreements: Iterator[int] = field(default_factory=itertools.count)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def device(self) -> torch.device:
        """Where tensors of our own making are put to be sent."""
        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self.device_type)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Group":
        """Itself: copies of a layer (a running average of a model) talk over the same group."""
        return self

    @staticmethod
    def alone(rank: int = 0) -> "Group":
        """The group of one rank."""
        return Group((rank,), 0, None)


def split_sizes(length: int, parts: int) -> list[int]:
    """Lengths of ``parts`` pieces as equal as can be, the longer ones first."""
    short, longer = divmod(length, parts)
    return [short + (index < longer) for index in range(parts)]


def own_range(length: int, group: Group) -> tuple[int, int]:
    """Where this rank's piece of ``split_sizes`` begins and ends."""
    sizes = split_sizes(length, group.size)
    start = sum(sizes[: group.index])
    return start, start + sizes[group.index]


def all_to_all(
    x: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    group: Group,
    *,
    kind: str = "all_to_all",
) -> Tensor:
    """Send each rank its rows; returns the rows received, by sender. Backward sends back.

    Args:
        x: ``(N, ...)``, rows for rank 0 of the group first; N is the sum of ``sent``.
        sent: Rows for each rank.
        received: Rows from each rank.
        group: Who takes part; all of them must.
        kind: Under which name the bytes are counted.

    Returns:
        ``(sum of received, ...)``.
    """
    if group.process_group is None:
        return x
    return _AllToAll.apply(x, list(sent), list(received), group, kind)


def exchange_rows(
    x: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    group: Group,
    *,
    kind: str,
) -> Tensor:
    """``all_to_all`` without gradient."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(
        out, x.contiguous(), list(received), list(sent), group=group.process_group
    )
    width = x[:1].numel() if len(x) else 0
    leaving = sum(sent) - sent[group.index]
    group.traffic.add(kind, leaving * width * x.element_size())
    return out


def all_gather(
    x: Tensor, group: Group, dim: int = 0, *, sizes: Sequence[int] | None = None
) -> Tensor:
    """The ranks' parts one after the other along ``dim``. Backward sums and hands out the parts.

    Args:
        x: This rank's part.
        group: Who takes part.
        dim: Where the parts are joined.
        sizes: Length of every rank's part along ``dim``; None where all are equal.
    """
    if group.process_group is None:
        return x
    sizes = [x.shape[dim]] * group.size if sizes is None else list(sizes)
    return _AllGather.apply(x, group, dim, sizes)


def reduce_scatter(
    x: Tensor, group: Group, dim: int = 0, *, sizes: Sequence[int] | None = None
) -> Tensor:
    """This rank's part, along ``dim``, of the sum over ranks. Backward gathers the parts.

    Args:
        x: The whole, as every rank has it.
        group: Who takes part.
        dim: Where it is cut.
        sizes: Length of every rank's part along ``dim``; None cuts it by ``split_sizes``.
    """
    if group.process_group is None:
        return x
    sizes = split_sizes(x.shape[dim], group.size) if sizes is None else list(sizes)
    return _ReduceScatter.apply(x, group, dim, sizes)


def total(x: Tensor, group: Group, *, gradient_factor: float = 1.0) -> Tensor:
    """The sum over ranks, whose gradient flows through this rank's addend only.

    For a statistic that enters a loss on every rank, where gradients are summed over ranks later:
    each rank contributes the part that its own addend has in the one loss.

    Args:
        x: This rank's addend.
        group: Who takes part.
        gradient_factor: Multiplies the gradient; a wrapper that averages over n ranks needs n.
    """
    if group.process_group is None:
        return x
    return _Total.apply(x, group, gradient_factor)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks, as a value that every rank uses; backward sums too."""
    if group.process_group is None:
        return x
    return _AllReduce.apply(x, group)


def gather_sizes(size: int, group: Group) -> list[int]:
    """What ``size`` is on every rank. The host waits for the answer."""
    if group.process_group is None:
        return [size]
    sizes = torch.empty(group.size, dtype=torch.int64, device=group.device)
    # Filled, not copied: a copy from the host would wait once more.
    own = torch.full((1,), size, dtype=torch.int64, device=group.device)
    _gather_single(sizes, own, group=group.process_group)
    group.traffic.add("sizes", (group.size - 1) * own.element_size())
    return sizes.tolist()


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group, kind: str
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group, ctx.kind = sent, received, group, kind
        return exchange_rows(x, sent, received, group, kind=kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kind = f"{ctx.kind} backward"
        back = exchange_rows(grad, ctx.received, ctx.sent, ctx.group, kind=kind)
        return back, None, None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return _all_gather(x, group, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _reduce_scatter(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: list[int]) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return _reduce_scatter(x, group, dim, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _all_gather(grad, ctx.group, ctx.dim, ctx.sizes), None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, gradient_factor: float) -> Tensor:
        ctx.gradient_factor = gradient_factor
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad * ctx.gradient_factor, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _all_reduce(grad, ctx.group), None


def _all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    # Parts of one size go by the collective that every backend has; shorter ones are filled up.
    longest = max(sizes)
    if longest == 0:
        return x
    rows = _padded(x.movedim(dim, 0), longest).contiguous()
    out = rows.new_empty(group.size * longest, *rows.shape[1:])
    _gather_single(out, rows, group=group.process_group)
    group.traffic.add("all_gather", (group.size - 1) * rows.numel() * rows.element_size())
    if any(size != longest for size in sizes):
        parts = out.view(group.size, longest, *rows.shape[1:]).unbind(0)
        out = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
    return out.movedim(0, dim)


def _reduce_scatter(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    longest = max(sizes)
    if longest == 0:
        return x
    rows = x.movedim(dim, 0)
    if any(size != longest for size in sizes):
        rows = torch.cat([_padded(part, longest) for part in rows.split(list(sizes))])
    rows = rows.contiguous()
    out = rows.new_empty(longest, *rows.shape[1:])
    _reduce_scatter_single(out, rows, group=group.process_group)
    group.traffic.add("reduce_scatter", (group.size - 1) * out.numel() * out.element_size())
    return out[: sizes[group.index]].movedim(0, dim)


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group.process_group)
    sent = 2 * (group.size - 1) * out.numel() * out.element_size() // group.size
    group.traffic.add("all_reduce", sent)
    return out


def _padded(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    if missing == 0:
        return rows
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
