"""The Triton products in its interpreter against their dense definitions in float64.

Padding holds NaN in every test: nothing of it may get through. bfloat16 is left to the GPU, the
interpreter multiplies it wrongly.
"""

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.moe_mlp.block_sparse import products, reference
from expertmesh.kernels.moe_mlp.block_sparse.rows import pad_rows
from expertmesh.kernels.moe_mlp.block_sparse.topology import (
    Topology,
    joined_columns,
    make_topology,
    stacked_columns,
)
from expertmesh.testing import assert_close

CPU = torch.device("cpu")
BLOCK, DIM, MATRICES = 16, 37, 2
WIDTHS = (40, 16, 7, 33)
KINDS = ("stacked", "whole", "joined", "idle", "empty")


def topology_of(kind: str) -> Topology:
    g = torch.Generator().manual_seed(0)
    expert = torch.randint(0, 5, (45, 2), generator=g)
    if kind == "idle":
        expert[expert != 4] = 2
    elif kind == "empty":
        expert = expert[:0]
    if kind == "stacked":
        columns = stacked_columns(4, 40, BLOCK, CPU)
    elif kind == "whole":
        columns = stacked_columns(4, 32, BLOCK, CPU)
    else:
        columns = joined_columns(WIDTHS, BLOCK, CPU)
    return make_topology(pad_rows(expert, 4, BLOCK), columns)


def normal(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).float()


def values_of(topology: Topology) -> Tensor:
    """Random blocks; NaN where they are padded, and in blocks that are not in use."""
    shape = (MATRICES, len(topology.row_Z), BLOCK, BLOCK)
    values = normal(*shape, seed=1)
    real = reference.to_blocks(torch.ones_like(reference.to_dense(values, topology)), topology)
    return torch.where(real == 1, values, float("nan"))


def rows_of(topology: Topology) -> Tensor:
    """Random rows; NaN where they are padding."""
    rows = normal(len(topology.count_I) * BLOCK, DIM, seed=2)
    real = torch.arange(BLOCK) < topology.count_I.unsqueeze(1)
    return torch.where(real.reshape(-1, 1), rows, float("nan"))


def stack_of(topology: Topology) -> Tensor:
    """``(M, S, U, D)``; the slabs have units that no column names, which are NaN."""
    columns = topology.columns
    slabs = int(columns.slab_C.max()) + 1
    num_units = int((columns.first_C + columns.width_C).max())
    stack = normal(MATRICES, slabs, num_units + 3, DIM, seed=3)
    stack[:, :, num_units:] = float("nan")
    return stack


def real_rows(topology: Topology) -> Tensor:
    return (torch.arange(BLOCK) < topology.count_I.unsqueeze(1)).reshape(-1)


def joined(stack: Tensor, topology: Topology) -> Tensor:
    """The units that columns name, ``(M, H, D)``, by the columns' own table."""
    columns = topology.columns
    parts = []
    for c in range(len(columns.slab_C)):
        first = int(columns.first_C[c])
        parts.append(stack[:, columns.slab_C[c], first : first + int(columns.width_C[c])])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_to_blocks_inverts_to_dense(kind: str) -> None:
    topology = topology_of(kind)
    dense = reference.to_dense(values_of(topology), topology)
    assert torch.isfinite(dense).all()
    again = reference.to_dense(reference.to_blocks(dense, topology), topology)
    assert torch.equal(dense, again)


def test_dense_matrix_is_block_diagonal() -> None:
    """Expert e's rows meet expert e's units, and no others."""
    expert = torch.tensor([[0], [1], [1], [2]])
    rows = pad_rows(expert, 3, 2)
    topology = make_topology(rows, joined_columns([3, 1, 2], 2, CPU))
    ones = torch.ones(1, len(topology.row_Z), 2, 2)
    expected = torch.zeros(len(topology.count_I) * 2, 6)
    expected[0, :3] = 1
    expected[2:4, 3:4] = 1
    expected[4, 4:] = 1
    assert torch.equal(reference.to_dense(ones, topology)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", [False, True])
def test_sdd(kind: str, strided: bool) -> None:
    topology, stack = topology_of(kind), stack_of(topology_of(kind))
    left = torch.nan_to_num(rows_of(topology))
    if strided:
        stack, left = stack.mT.contiguous().mT, left.mT.contiguous().mT
    actual = reference.to_dense(products.sdd(left, stack, topology), topology)
    expected = reference.sdd(left.double(), stack.double(), topology)
    assert_close("sdd", actual, reference.to_dense(expected, topology).float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strided", [False, True])
def test_dsd(kind: str, strided: bool) -> None:
    topology, stack = topology_of(kind), stack_of(topology_of(kind))
    values = values_of(topology)
    if strided:
        stack = stack.mT.contiguous().mT
        values = values.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    actual = products.dsd(values, stack, topology)
    expected = reference.dsd(values.double(), stack.double(), topology).float()
    real = real_rows(topology)
    assert_close("dsd", actual[real], expected[real])
    in_use = (topology.count_I > 0).repeat_interleave(BLOCK)
    assert actual[in_use & ~real].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_dsd_transposed(kind: str) -> None:
    topology, right = topology_of(kind), rows_of(topology_of(kind))
    values, out = values_of(topology), torch.full_like(stack_of(topology), 7.0)
    products.dsd_transposed(values, right, out, topology)
    expected = reference.dsd_transposed(values.double(), right.double(), topology)
    assert_close("dsd transposed", joined(out, topology), expected.float())
    assert (out[:, :, -3:] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dds(kind: str) -> None:
    topology = topology_of(kind)
    values, left = values_of(topology), rows_of(topology).mT
    out = torch.full_like(stack_of(topology), 7.0).mT.contiguous()
    products.dds(left, values, out, topology)
    expected = reference.dds(left.double(), values.double(), topology)
    assert_close("dds", joined(out.mT, topology).mT, expected.float())


@pytest.mark.parametrize("kind", KINDS)
def test_dds_transposed(kind: str) -> None:
    topology = topology_of(kind)
    values, left = values_of(topology), stack_of(topology).mT
    actual = products.dds_transposed(left, values, topology)
    expected = reference.dds_transposed(left.double(), values.double(), topology).float()
    real = real_rows(topology)
    assert_close("dds transposed", actual[:, real], expected[:, real])


@pytest.mark.parametrize("kind", KINDS)
def test_row_dots(kind: str) -> None:
    topology = topology_of(kind)
    a, b = values_of(topology)
    actual = products.row_dots(a, b, topology)
    expected = reference.row_dots(a.double(), b.double(), topology).float()
    real = real_rows(topology)
    assert_close("row dots", actual[real], expected[real])


def test_two_runs_give_the_same_bits() -> None:
    topology = topology_of("joined")
    values, right = values_of(topology), rows_of(topology)
    first, second = (
        products.dsd_transposed(values, right, torch.zeros_like(stack_of(topology)), topology)
        for _ in range(2)
    )
    assert torch.equal(first, second)
