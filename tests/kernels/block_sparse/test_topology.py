"""Padded rows and the places of blocks, against plain loops over experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.moe_mlp.block_sparse import topology as topology_module
from expertmesh.kernels.moe_mlp.block_sparse.rows import most_row_blocks, pad_rows
from expertmesh.kernels.moe_mlp.block_sparse.topology import (
    Columns,
    Topology,
    joined_columns,
    make_topology,
    stacked_columns,
)

CPU = torch.device("cpu")
BLOCK = 4


def routing(rows: int, k: int, num_experts: int, seed: int) -> torch.Tensor:
    """Ids with sentinels, some experts without rows."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, num_experts + 1, (rows, k), generator=g)
    return torch.where(expert == 1, 0, expert)


ROUTINGS = given(
    rows=st.integers(0, 30),
    k=st.integers(1, 3),
    num_experts=st.integers(1, 6),
    seed=st.integers(0, 1000),
)


@ROUTINGS
@settings(max_examples=60, deadline=None, derandomize=True)
def test_each_expert_starts_a_block(rows: int, k: int, num_experts: int, seed: int) -> None:
    expert_RK = routing(rows, k, num_experts, seed)
    padded = pad_rows(expert_RK, num_experts, BLOCK)
    block = 0
    for expert in range(num_experts):
        mine = (expert_RK.reshape(-1) == expert).nonzero().squeeze(1)
        for part in mine.split(BLOCK) if len(mine) else ():
            start = block * BLOCK
            assert padded.order_P[start : start + len(part)].tolist() == part.tolist()
            assert padded.count_I[block] == len(part)
            assert padded.expert_I[block] == expert
            assert (padded.grouping.inverse_RK.reshape(-1)[part] // BLOCK == block).all()
            block += 1
        assert padded.grouping.offsets_E[expert] == block * BLOCK
    assert padded.count_I[block:].count_nonzero() == 0
    assert len(padded.count_I) == most_row_blocks(expert_RK.numel(), num_experts, BLOCK)
    assert block < len(padded.count_I) or expert_RK.numel() == 0
    assert torch.equal(padded.row_P, padded.order_P // k)
    valid = padded.grouping.valid_RK.reshape(-1)
    position = padded.grouping.inverse_RK.reshape(-1)[valid]
    assert padded.order_P[position].tolist() == valid.nonzero().squeeze(1).tolist()


def check_places(topology: Topology, expert_I: torch.Tensor) -> None:
    columns = topology.columns
    expected = []
    for row in range(len(topology.count_I)):
        if topology.count_I[row] > 0:
            first, stop = columns.start_E1[expert_I[row] :][:2].tolist()
            expected += [(row, column) for column in range(first, stop)]
    used = int(topology.row_offset_I1[-1])
    pairs = list(zip(topology.row_Z.tolist(), topology.column_Z.tolist(), strict=True))
    assert pairs[:used] == expected
    for row in range(len(topology.count_I)):
        start, stop = topology.row_offset_I1[row : row + 2].tolist()
        assert all(pair[0] == row for pair in expected[start:stop])
    by_column = sorted(range(used), key=lambda z: (expected[z][1], expected[z][0]))
    transposed_Z, row_Z, count_Z = topology.transposed_Z3[:used].unbind(1)
    assert transposed_Z.tolist() == by_column
    assert torch.equal(row_Z, topology.row_Z[by_column])
    assert torch.equal(count_Z, topology.count_I[row_Z])
    table = zip(columns.slab_C, columns.first_C, columns.width_C, strict=True)
    table = [tuple(map(int, row)) for row in table]
    assert [tuple(row) for row in topology.unit_Z3[:used].tolist()] == [
        table[c] for _, c in expected
    ]
    for column in range(len(columns.slab_C)):
        start, stop = topology.column_offset_C1[column : column + 2].tolist()
        assert all(expected[z][1] == column for z in by_column[start:stop])
    assert topology.column_offset_C1[-1] == used
    assert sorted(topology.walk_Z[:used].tolist()) == list(range(used))
    assert len(topology.row_Z) >= used


@ROUTINGS
@settings(max_examples=40, deadline=None, derandomize=True)
def test_places_with_equal_widths(rows: int, k: int, num_experts: int, seed: int) -> None:
    columns = stacked_columns(num_experts, 2 * BLOCK + 1, BLOCK, CPU)
    padded = pad_rows(routing(rows, k, num_experts, seed), num_experts, BLOCK)
    check_places(make_topology(padded, columns), padded.expert_I)


@ROUTINGS
@settings(max_examples=40, deadline=None, derandomize=True)
def test_places_with_unequal_widths(rows: int, k: int, num_experts: int, seed: int) -> None:
    widths = [1 + 5 * (expert % 3) for expert in range(num_experts)]
    padded = pad_rows(routing(rows, k, num_experts, seed), num_experts, BLOCK)
    topology = make_topology(padded, joined_columns(widths, BLOCK, CPU))
    check_places(topology, padded.expert_I)
    if num_experts > 2:
        assert len(topology.row_Z) == topology.row_offset_I1[-1]


def test_neighbours_in_the_walk_share_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_module, "_GROUP", 2)
    padded = pad_rows(torch.zeros(4 * BLOCK, 1, dtype=torch.int64), 1, BLOCK)
    topology = make_topology(padded, stacked_columns(1, 3 * BLOCK, BLOCK, CPU))
    walk = topology.walk_Z[: topology.row_offset_I1[-1]].long()
    pairs = list(zip(topology.row_Z[walk].tolist(), topology.column_Z[walk].tolist(), strict=True))
    assert pairs == [(2 * g + r, c) for g in range(2) for c in range(3) for r in range(2)]


def units(columns: Columns) -> list[tuple[int, int, int]]:
    fields = (columns.slab_C, columns.first_C, columns.width_C)
    return list(zip(*(field.tolist() for field in fields), strict=True))


def test_stacked_columns() -> None:
    columns = stacked_columns(2, 10, 4, CPU)
    assert units(columns) == [(e, f, w) for e in range(2) for f, w in ((0, 4), (4, 4), (8, 2))]
    assert columns.start_E1.tolist() == [0, 3, 6]
    assert (columns.each, columns.whole, columns.align) == (3, False, 1)
    assert stacked_columns(2, 8, 4, CPU).whole
    assert stacked_columns(2, 48, 32, CPU).align == 16


def test_joined_columns() -> None:
    columns = joined_columns([5, 4, 1], 4, CPU)
    assert units(columns) == [(0, 0, 4), (0, 4, 1), (0, 5, 4), (0, 9, 1)]
    assert columns.start_E1.tolist() == [0, 2, 3, 4]
    assert (columns.each, columns.whole) == (None, False)
    equal = joined_columns([4, 3], 4, CPU)
    assert (equal.each, equal.whole) == (1, False)
    assert joined_columns([8, 4], 4, CPU).whole
    assert [joined_columns([48, f], 32, CPU).align for f in (32, 40)] == [16, 1]
