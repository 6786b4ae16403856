"""Sorting assignments by expert, and bringing rows back."""

import pytest
import torch

from expertmesh.kernels.grouping import _combine_passes, combine, combine_zeroed, group_by_expert
from expertmesh.testing import assert_close


def test_order_is_by_expert_then_row_then_choice() -> None:
    grouping = group_by_expert(torch.tensor([[2, 0], [0, 3], [2, 2]]), 3)
    assert grouping.order_N.tolist() == [1, 2, 0, 4, 5, 3]
    assert grouping.row_N.tolist() == [0, 1, 0, 2, 2, 1]
    assert grouping.offsets_E.tolist() == [2, 2, 5]
    assert grouping.offsets_E.dtype == torch.int32
    assert grouping.valid_RK.tolist() == [[True, True], [True, False], [True, True]]


def test_inverse_undoes_order() -> None:
    expert = torch.randint(0, 8, (50, 3), generator=torch.Generator().manual_seed(0))
    grouping = group_by_expert(expert, 7)
    assert torch.equal(grouping.order_N[grouping.inverse_RK], torch.arange(150).view(50, 3))
    counts = torch.diff(grouping.offsets_E, prepend=torch.zeros(1, dtype=torch.int32))
    assert torch.equal(counts.long(), torch.bincount(expert.flatten(), minlength=8)[:7])


def test_no_rows() -> None:
    grouping = group_by_expert(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert grouping.offsets_E.tolist() == [0, 0, 0]
    assert combine(torch.zeros(0, 4), grouping, torch.zeros(0, 2), torch.float32).shape == (0, 4)


def test_combine_masks_sentinels() -> None:
    grouping = group_by_expert(torch.tensor([[1, 2], [2, 0]]), 2)
    rows = torch.tensor([[3.0], [5.0], [float("nan")], [float("inf")]])
    weight = torch.tensor([[0.5, float("nan")], [1.0, 2.0]])
    y = combine(rows, grouping, weight, torch.float64)
    assert_close("y", y, torch.tensor([[2.5], [6.0]], dtype=torch.float64))
    unweighted = combine(rows, grouping, None, torch.float32)
    assert_close("unweighted", unweighted, torch.tensor([[5.0], [3.0]]))
    assert rows[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "k"), [(0, 2), (1, 1), (37, 3)])
def test_combining_zeroed_rows_equals_combining_masked_ones(dtype, weighted, rows, k):
    torch.manual_seed(rows)
    expert_RK = torch.randint(0, 6, (rows, k))  # 5 is the sentinel
    grouping = group_by_expert(expert_RK, 5)
    rows_ND = torch.randn(rows * k, 7, dtype=dtype)
    weight_RK = torch.randn(rows, k, dtype=dtype) if weighted else None
    if weight_RK is not None:
        weight_RK[expert_RK == 5] = torch.nan
    rows_ND[int((expert_RK < 5).sum()) :] = 0
    ours = combine_zeroed(rows_ND, grouping, weight_RK, torch.float64)
    assert_close("sum", ours, combine(rows_ND, grouping, weight_RK, torch.float64), tol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sentinels", [False, True])
def test_combining_in_few_passes_equals_combining_masked_rows(dtype, weighted, sentinels):
    torch.manual_seed(0)
    expert_RK = torch.randint(0, 6 if sentinels else 5, (37, 3))  # 5 is the sentinel
    grouping = group_by_expert(expert_RK, 5)
    rows_ND = torch.randn(111, 7).to(dtype)
    rows_ND[int((expert_RK < 5).sum()) :] = torch.nan
    weight_RK = torch.where(expert_RK < 5, torch.randn(37, 3), torch.nan) if weighted else None
    expected = combine(rows_ND, grouping, weight_RK, torch.float32)
    ours = _combine_passes(rows_ND.clone(), grouping, weight_RK, torch.float32)
    assert_close("sum", ours, expected, tol=1e-6)
