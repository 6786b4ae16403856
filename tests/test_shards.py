"""Boxes of logical tensors, against torch's own way of putting them together."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import global_index, is_sharded, local, shard_of
from expertmesh.testing import run_on_ranks
from tests.distributed.layers import layer


def test_a_plain_tensor_is_all_here() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert not is_sharded(x)
    assert local(x) is x
    shard = shard_of(x)
    assert (shard.shape, shard.offset) == ((3, 4), (0, 0))
    assert shard.local.data_ptr() == x.data_ptr()
    assert not shard.local.requires_grad
    assert global_index(shard, 1, 3).tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert global_index(shard, 2, 2).shape == (0, 4)
    assert shard_of(torch.ones(())).offset == ()


def numbered(degrees: dict[str, Any], zero: int) -> dict[str, bool]:
    """Every element is given its flat index in the whole by whoever holds it."""
    moe = parallelize(layer(), Mesh(**degrees), zero=zero)
    found = {}
    for name, param in moe.named_parameters():
        shard = shard_of(param)
        for row in range(len(shard.local)):
            shard.local[row] = global_index(shard, row, row + 1)[0].double()
        whole = param.full_tensor() if isinstance(param, DTensor) else param
        expected = torch.arange(whole.numel(), dtype=torch.float64).view(whole.shape)
        found[name] = torch.equal(whole.detach(), expected)
        assert is_sharded(param)
        assert local(param).shape == shard.local.shape
    return found


@pytest.mark.parametrize(
    ("degrees", "zero"),
    [
        ({"ep": 2, "etp": 2}, 0),
        ({"ep": 2}, 3),  # strided: edp cuts what ep has cut
        ({"edp": 4}, 1),
        ({"edp": 2, "etp": 2, "placement": "outside"}, 2),
    ],
    ids=str,
)
def test_boxes_are_where_torch_puts_them(degrees: dict[str, Any], zero: int) -> None:
    for found in run_on_ranks(4, numbered, degrees, zero):
        assert len(found) == 3
        assert all(found.values()), found


def uneven() -> list[tuple[list[int], list[int]]]:
    """Rows that do not divide, and a rank without any."""
    mesh = Mesh()
    boxes = []
    for rows in (5, 2):
        whole = torch.arange(rows * 2.0).view(rows, 2)
        part = distribute_tensor(whole, mesh.dense["dp"], [Shard(0)])
        shard = shard_of(part)
        assert torch.equal(global_index(shard, 0, len(shard.local)).float(), shard.local)
        boxes.append((list(shard.local.shape), list(shard.offset)))
    return boxes


def test_uneven_and_empty_boxes() -> None:
    by_rank = run_on_ranks(3, uneven)
    assert [boxes[0] for boxes in by_rank] == [([2, 2], [0, 0]), ([2, 2], [2, 0]), ([1, 2], [4, 0])]
    assert [boxes[1][0] for boxes in by_rank] == [[1, 2], [1, 2], [0, 2]]


def gradient_of_local() -> Tensor:
    mesh = Mesh()
    whole = torch.arange(6.0).view(2, 3)
    param = torch.nn.Parameter(distribute_tensor(whole, mesh.dense["dp"], [Shard(0)]))
    (local(param) * (mesh.rank + 2)).sum().backward()
    assert isinstance(param.grad, DTensor)
    return param.grad.full_tensor()


def test_a_local_part_carries_the_gradient_of_its_box() -> None:
    for gradient in run_on_ranks(2, gradient_of_local):
        assert gradient.tolist() == [[2.0] * 3, [3.0] * 3]


def test_every_index_is_named_once_by_boxes_that_tile() -> None:
    whole = torch.arange(4 * 2 * 6).view(4, 2, 6)
    for rows, columns in itertools.product([slice(0, 1), slice(1, 4)], [slice(0, 2), slice(2, 6)]):
        offset = (rows.start, 0, columns.start)
        box = shard_of(whole[rows, :, columns])
        placed = type(box)(box.local, tuple(whole.shape), offset)
        assert torch.equal(global_index(placed, 0, len(box.local)), box.local)
