"""Grouped products against one product for each group, and as operators of the torch library."""

import pytest
import torch

from expertmesh.kernels.grouped_gemm import GroupedGemm, LoopGemm, TorchGroupedMM
from expertmesh.kernels.grouped_gemm.matmul import matmul_transposed
from expertmesh.testing import assert_close

OFFSETS = torch.tensor([4, 4, 11, 15], dtype=torch.int32)
GEMMS = [
    (LoopGemm(), torch.float64),
    (LoopGemm(), torch.float32),
    (TorchGroupedMM(), torch.float32),
]


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """20 rows, 5 of them in no group and holding NaN; widths 8 and 12, four groups."""
    g = torch.Generator().manual_seed(0)
    x, weight, y = (torch.randn(*s, generator=g).to(dtype) for s in ((20, 8), (4, 8, 12), (20, 12)))
    x[15:], y[15:] = float("nan"), float("nan")
    return x, weight, y


@pytest.mark.parametrize(("gemm", "dtype"), GEMMS)
def test_matmul(gemm: GroupedGemm, dtype: torch.dtype) -> None:
    x, weight, _ = operands(dtype)
    for layout in (weight, weight.mT.contiguous().mT):
        y = gemm.matmul(x, layout, OFFSETS)
        assert y.shape == (20, 12)
        start = 0
        for group, stop in enumerate(OFFSETS.tolist()):
            assert_close(f"group {group}", y[start:stop], x[start:stop] @ weight[group])
            start = stop


@pytest.mark.parametrize(("gemm", "dtype"), GEMMS)
def test_outer(gemm: GroupedGemm, dtype: torch.dtype) -> None:
    x, _, y = operands(dtype)
    product = gemm.outer(x, y, OFFSETS)
    assert product.shape == (4, 8, 12)
    assert product[1].count_nonzero() == 0
    start = 0
    for group, stop in enumerate(OFFSETS.tolist()):
        assert_close(f"group {group}", product[group], x[start:stop].T @ y[start:stop])
        start = stop


@pytest.mark.parametrize(("gemm", "dtype"), GEMMS)
def test_no_rows(gemm: GroupedGemm, dtype: torch.dtype) -> None:
    x, weight, y = operands(dtype)
    offsets = torch.zeros_like(OFFSETS)
    assert gemm.matmul(x[:0], weight, offsets).shape == (0, 12)
    assert gemm.outer(x[:0], y[:0], offsets).count_nonzero() == 0


def test_operators_of_the_library() -> None:
    x, weight, y = operands(torch.float64)
    x, y = x.nan_to_num(), y.nan_to_num()
    torch.library.opcheck(torch.ops.expertmesh.grouped_matmul.default, (x, weight, OFFSETS))
    torch.library.opcheck(torch.ops.expertmesh.grouped_outer.default, (x, y, OFFSETS))


def test_the_products_alone_have_no_gradient() -> None:
    x, weight, _ = operands(torch.float64)
    y = LoopGemm().matmul(x.requires_grad_(), weight, OFFSETS)
    with pytest.raises(RuntimeError, match="call moe_mlp instead"):
        y[:15].sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_matmul_transposed(dtype: torch.dtype, rows: int) -> None:
    """Every layout that the gradients use; 64 rows of float32 go to oneDNN where there is one."""
    a, b = torch.randn(rows, 40).to(dtype), torch.randn(24, 40).to(dtype)
    tall, wide = torch.randn(40, 2 * rows).to(dtype), torch.randn(40, 24).to(dtype)
    for left, right in ((a, b), (tall[:, :rows].t(), wide.t()), (a, wide.t())):
        actual = matmul_transposed(left, right)
        assert actual.is_contiguous()
        assert_close(f"{dtype}", actual, (left.double() @ right.double().T).to(dtype))
