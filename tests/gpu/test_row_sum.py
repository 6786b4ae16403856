"""Sums of a few rows each by the kernel against torch's operations in float64."""

import pytest
import torch

from expertmesh.kernels.row_sum import sum_rows
from expertmesh.testing import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [8, 1000, 5000])
def test_sums(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows_NX = torch.randn(3000, width, device="cuda", dtype=dtype)
    place_TJ = torch.randint(-1, 3000, (2000, 3), device="cuda")
    known = (place_TJ >= 0).unsqueeze(2)
    expected = (rows_NX.double()[place_TJ.clamp_min(0)] * known).sum(1)
    out_TX = sum_rows(rows_NX, place_TJ, dtype)
    assert_close("sum", out_TX, expected.to(dtype))
    assert torch.equal(out_TX, sum_rows(rows_NX, place_TJ, dtype))


def test_nothing() -> None:
    place_TJ = torch.full((4, 2), -1, device="cuda")
    assert not sum_rows(torch.randn(0, 8, device="cuda"), place_TJ, torch.float32).any()
