"""The tables of a routing, from Triton's interpreter, against sorting."""

import pytest
import torch

from expertmesh.kernels.grouping import group_by_expert
from expertmesh.kernels.layout import make_layout, most_tiles


@pytest.mark.parametrize(
    ("rows", "k", "num_experts", "sentinels"),
    [(1, 1, 1, 0.0), (100, 3, 5, 0.1), (200, 2, 40, 0.0), (5, 2, 7, 1.0), (3, 1, 100, 0.0)],
)
def test_tables(rows: int, k: int, num_experts: int, sentinels: float) -> None:
    g = torch.Generator().manual_seed(rows)
    expert_RK = torch.randint(0, num_experts, (rows, k), generator=g).square() % num_experts
    expert_RK[torch.rand(rows, k, generator=g) < sentinels] = num_experts
    layout = make_layout(expert_RK, num_experts, 16)
    expected = group_by_expert(expert_RK, num_experts)

    valid = int(expected.offsets_E[-1])
    assert torch.equal(layout.offset_E1[1:], expected.offsets_E)
    assert layout.offset_E1[0] == 0
    assert torch.equal(layout.order_N[:valid].long(), expected.order_N[:valid])
    inverse_RK = expected.inverse_RK.masked_fill(~expected.valid_RK, -1)
    assert torch.equal(layout.inverse_N.view(rows, k).long(), inverse_RK)

    count_E = layout.offset_E1.diff()
    longest = torch.sort(count_E, descending=True, stable=True).indices
    assert torch.equal(layout.longest_E.long(), longest)
    tiles = [
        [expert, first, int(layout.offset_E1[expert + 1])]
        for expert in range(num_experts)
        for first in range(int(layout.offset_E1[expert]), int(layout.offset_E1[expert + 1]), 16)
    ]
    assert int(layout.num_tiles_1) == len(tiles) <= most_tiles(rows * k, num_experts, 16)
    assert layout.tile_P3[: len(tiles)].tolist() == tiles


def test_narrow_ids_give_the_same_tables() -> None:
    expert_RK = torch.tensor([[2, 0], [3, 1], [0, 2]])
    wide, narrow = (make_layout(ids, 3, 16) for ids in (expert_RK, expert_RK.int()))
    assert torch.equal(wide.inverse_N, narrow.inverse_N)
    assert wide.inverse_N.tolist() == [3, 0, -1, 2, 1, 4]
