"""Collectives against their definition on the list of all ranks' tensors."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from expertmesh.dispatch.collectives import (
    Group,
    all_gather,
    all_reduce,
    all_to_all,
    gather_sizes,
    own_range,
    reduce_scatter,
    split_sizes,
    total,
)
from expertmesh.testing import assert_close, run_on_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
WORLD = 3


@dataclass(frozen=True)
class Passed:
    """What one rank got from one collective."""

    out: Tensor
    dx: Tensor
    bytes_sent: dict[str, int]


def values(shape: Sequence[int], rank: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Some rank's tensor, known to every rank."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def everyone() -> Group:
    return Group(tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD, "cpu")


def passed(call: Callable[[Tensor, Group], Tensor], x: Tensor) -> Passed:
    """Forward, and backward from a gradient that is known to every rank."""
    group = everyone()
    x.requires_grad_()
    out = call(x, group)
    out.backward(values(out.shape, group.index, out.dtype, seed=1))
    assert x.grad is not None
    assert x.grad.dtype == out.dtype == x.dtype
    return Passed(out.detach(), x.grad, dict(group.traffic.bytes_sent))


def by_case(
    function: Callable[[torch.dtype], list[Passed]], dtype: torch.dtype
) -> list[tuple[Passed, ...]]:
    """What the ranks got, case by case."""
    return list(zip(*run_on_ranks(WORLD, function, dtype), strict=True))


# All-to-all: rows[i][j] go from rank i to rank j.

EVEN = [[2, 2, 2]] * 3
UNEVEN = [[1, 0, 4], [2, 3, 0], [0, 0, 5]]
SILENT = [[0, 0, 0], [3, 0, 1], [0, 0, 0]]
NOTHING = [[0, 0, 0]] * 3
EXCHANGES = [EVEN, UNEVEN, SILENT, NOTHING]


def exchanges(dtype: torch.dtype) -> list[Passed]:
    return [exchange(rows, dtype) for rows in EXCHANGES]


def exchange(rows: list[list[int]], dtype: torch.dtype) -> Passed:
    rank = dist.get_rank()
    sent, received = rows[rank], [row[rank] for row in rows]
    x = values((sum(sent), 2, 3), rank, dtype)
    return passed(lambda x, group: all_to_all(x, sent, received, group, kind="rows"), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_to_all(dtype: torch.dtype) -> None:
    for rows, views in zip(EXCHANGES, by_case(exchanges, dtype), strict=True):
        check_exchange(rows, views, dtype)


def check_exchange(rows: list[list[int]], views: Sequence[Passed], dtype: torch.dtype) -> None:
    inputs = [values((sum(sent), 2, 3), i, dtype).split(sent) for i, sent in enumerate(rows)]
    expected = [torch.cat([parts[j] for parts in inputs]) for j in range(WORLD)]
    incoming = [
        values(out.shape, j, dtype, seed=1).split([row[j] for row in rows])
        for j, out in enumerate(expected)
    ]
    for i, got in enumerate(views):
        assert torch.equal(got.out, expected[i])
        assert torch.equal(got.dx, torch.cat([grads[i] for grads in incoming]))
        row_bytes = 6 * got.out.element_size()
        arriving = sum(row[i] for j, row in enumerate(rows) if j != i)
        assert got.bytes_sent == {
            "rows": (sum(rows[i]) - rows[i][i]) * row_bytes,
            "rows backward": arriving * row_bytes,
        }


# Gather and scatter: a dim is cut into parts, some of them empty.

SIZES = [[2, 2, 2], [2, 1, 1], [3, 0, 1], [0, 0, 0]]
CUTS = list(itertools.product(SIZES, [0, 1, -1]))
SHAPE = (4, 5, 2)


def cut(sizes: list[int], dim: int, rank: int) -> tuple[int, ...]:
    shape = list(SHAPE)
    shape[dim] = sizes[rank]
    return tuple(shape)


def gathers(dtype: torch.dtype) -> list[Passed]:
    return [gathered(sizes, dim, dtype) for sizes, dim in CUTS]


def gathered(sizes: list[int], dim: int, dtype: torch.dtype) -> Passed:
    x = values(cut(sizes, dim, dist.get_rank()), dist.get_rank(), dtype)
    given = None if len(set(sizes)) == 1 else sizes
    return passed(lambda x, group: all_gather(x, group, dim, sizes=given), x)


def tolerance(dtype: torch.dtype) -> float:
    """Of sums of three numbers, in whatever order."""
    return {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather(dtype: torch.dtype) -> None:
    for (sizes, dim), views in zip(CUTS, by_case(gathers, dtype), strict=True):
        check_gather(sizes, dim, views, dtype)


def check_gather(sizes: list[int], dim: int, views: Sequence[Passed], dtype: torch.dtype) -> None:
    expected = torch.cat([values(cut(sizes, dim, i), i, dtype) for i in range(WORLD)], dim)
    grads = [values(expected.shape, i, dtype, seed=1).double() for i in range(WORLD)]
    parts = sum(grads[1:], grads[0]).split(sizes, dim)
    part_bytes = expected.numel() // max(sum(sizes), 1) * max(sizes) * expected.element_size()
    for i, got in enumerate(views):
        assert torch.equal(got.out, expected)
        assert_close("gradient", got.dx.double(), parts[i], tolerance(dtype))
        counted = {"all_gather": 2 * part_bytes, "reduce_scatter": 2 * part_bytes}
        assert got.bytes_sent == (counted if sum(sizes) else {})


def scatters(dtype: torch.dtype) -> list[Passed]:
    return [scattered(sizes, dim, dtype) for sizes, dim in CUTS]


def scattered(sizes: list[int], dim: int, dtype: torch.dtype) -> Passed:
    shape = cut([sum(sizes)], dim, 0)
    x = values(shape, dist.get_rank(), dtype)
    given = None if sizes == split_sizes(sum(sizes), WORLD) else sizes
    return passed(lambda x, group: reduce_scatter(x, group, dim, sizes=given), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce_scatter(dtype: torch.dtype) -> None:
    for (sizes, dim), views in zip(CUTS, by_case(scatters, dtype), strict=True):
        check_scatter(sizes, dim, views, dtype)


def check_scatter(sizes: list[int], dim: int, views: Sequence[Passed], dtype: torch.dtype) -> None:
    shape = cut([sum(sizes)], dim, 0)
    inputs = [values(shape, i, dtype).double() for i in range(WORLD)]
    parts = sum(inputs[1:], inputs[0]).split(sizes, dim)
    whole = torch.cat([values(p.shape, i, dtype, seed=1) for i, p in enumerate(parts)], dim)
    for i, got in enumerate(views):
        assert_close("part", got.out.double(), parts[i], tolerance(dtype))
        assert torch.equal(got.dx, whole)
        part_bytes = whole.numel() // max(sum(sizes), 1) * max(sizes) * whole.element_size()
        counted = {"all_gather": 2 * part_bytes, "reduce_scatter": 2 * part_bytes}
        assert got.bytes_sent == (counted if sum(sizes) else {})


# Sums that every rank gets.


def summed(dtype: torch.dtype) -> dict[str, Passed]:
    x = values((2, 3), dist.get_rank(), dtype)
    return {
        "total": passed(total, x.clone()),
        "threefold": passed(lambda x, group: total(x, group, gradient_factor=3.0), x.clone()),
        "all_reduce": passed(all_reduce, x.clone()),
        "transposed": passed(lambda x, group: all_reduce(x.T, group), x.clone()),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_and_whose_gradient_they_carry(dtype: torch.dtype) -> None:
    inputs = [values((2, 3), i, dtype).double() for i in range(WORLD)]
    grads = [values((2, 3), i, dtype, seed=1).double() for i in range(WORLD)]
    turned = [values((3, 2), i, dtype, seed=1).double().T for i in range(WORLD)]
    for i, got in enumerate(run_on_ranks(WORLD, summed, dtype)):
        dx = {
            "total": grads[i],
            "threefold": 3 * grads[i],
            "all_reduce": sum(grads[1:], grads[0]),
            "transposed": sum(turned[1:], turned[0]),
        }
        for name, one in got.items():
            out = one.out.double()
            expected = sum(inputs[1:], inputs[0])
            assert_close(name, out.T if name == "transposed" else out, expected, tolerance(dtype))
            assert_close(f"{name} gradient", one.dx.double(), dx[name], tolerance(dtype))
            each = 2 * 2 * one.out.nbytes // 3
            both_ways = name in ("all_reduce", "transposed")
            assert one.bytes_sent == {"all_reduce": 2 * each if both_ways else each}


def integers_and_views() -> tuple[list[int], Tensor, Tensor, list[int]]:
    """Counts are summed exactly; inputs and gradients may be any view."""
    group = everyone()
    counts = total(torch.tensor([2**60 + group.index, group.index]), group).tolist()
    x = values((6, 4), group.index, torch.float64)[::2, 1:3].requires_grad_()
    rows = [1, 1, 1]
    out = all_to_all(x, rows, rows, group)
    (gradient,) = torch.autograd.grad(out.sum(), x)  # an expanded gradient
    return counts, out.detach(), gradient, gather_sizes(group.index * 5, group)


def test_integers_views_and_sizes() -> None:
    inputs = [values((6, 4), i, torch.float64)[::2, 1:3] for i in range(WORLD)]
    for i, (counts, out, gradient, sizes) in enumerate(run_on_ranks(WORLD, integers_and_views)):
        assert counts == [3 * 2**60 + 3, 3]
        assert torch.equal(out, torch.stack([x[i] for x in inputs]))
        assert torch.equal(gradient, torch.ones(3, 2, dtype=torch.float64))
        assert sizes == [0, 5, 10]


def test_a_group_of_one_returns_what_it_is_given() -> None:
    group = Group.alone(rank=5)
    x = torch.ones(3, 2, requires_grad=True)
    assert (group.ranks, group.index, group.size) == ((5,), 0, 1)
    assert all_to_all(x, [3], [3], group) is x
    assert all_gather(x, group, 1) is x
    assert reduce_scatter(x, group, 1) is x
    assert total(x, group, gradient_factor=7.0) is x
    assert all_reduce(x, group) is x
    assert gather_sizes(3, group) == [3]
    assert group.traffic.bytes_sent == {}


@pytest.mark.parametrize("length", [0, 1, 3, 7, 8, 9])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_parts_are_as_torch_cuts_them(length: int, parts: int) -> None:
    expected = torch.arange(length).tensor_split(parts)
    assert split_sizes(length, parts) == [len(part) for part in expected]
    for index, part in enumerate(expected):
        start, stop = own_range(length, Group(tuple(range(parts)), index, None))
        assert list(range(start, stop)) == part.tolist()
