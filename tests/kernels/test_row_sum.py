"""Sums of a few rows each, against a loop; the kernel under Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.choice_sum import sum_choices
from expertmesh.kernels.row_sum import sum_rows
from expertmesh.testing import assert_close


def case(num_rows: int, sums: int, each: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + sums)
    rows_NX = torch.randn(num_rows, width, generator=generator)
    place_TJ = torch.randint(-1, num_rows, (sums, each), generator=generator)
    place_TJ[::3] = -1  # none at all
    return rows_NX, place_TJ


def one_by_one(rows_NX: Tensor, place_TJ: Tensor) -> Tensor:
    out_TX = torch.zeros(len(place_TJ), rows_NX.shape[1], dtype=torch.float64)
    for t, places in enumerate(place_TJ.tolist()):
        for place in places:
            if place >= 0:
                out_TX[t] += rows_NX[place]
    return out_TX


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 5, 2, 3), (40, 33, 8, 17), (3, 9, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows_NX, place_TJ = case(*shape)
    rows_NX = rows_NX.to(dtype)
    expected = one_by_one(rows_NX, place_TJ).to(dtype)
    assert_close("sum", sum_rows(rows_NX, place_TJ, dtype), expected)
    if dtype != torch.float64:
        out_TX = torch.empty_like(expected)
        assert_close("kernel", sum_choices(rows_NX, place_TJ, out_TX), expected)


@pytest.mark.parametrize(("num_rows", "sums"), [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_read_or_to_add(num_rows: int, sums: int) -> None:
    place_TJ = torch.full((sums, 2), -1)
    out_TX = sum_rows(torch.randn(num_rows, 5), place_TJ, torch.float32)
    assert out_TX.shape == (sums, 5)
    assert not out_TX.any()
