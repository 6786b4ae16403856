"""Output layer and loss at once on a GPU, where bfloat16 products are added up in float32."""

import pytest
import torch

from expertmesh.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from expertmesh.testing import assert_close

pytestmark = pytest.mark.gpu
KIND = CrossEntropy(label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 1 << 12, 1 << 28])
def test_bfloat16_products_against_float64(dtype: torch.dtype, at_once: int) -> None:
    torch.manual_seed(0)
    hidden_ND, weight_VD = torch.randn(257, 64, device="cuda"), torch.randn(1001, 64, device="cuda")
    targets_N = torch.randint(1001, (257,), device="cuda")
    targets_N[::3] = -100
    found = []
    for wide in (False, True):
        leaves = [
            t.to(dtype).to(torch.float64 if wide else dtype).detach().requires_grad_()
            for t in (hidden_ND, weight_VD)
        ]
        with torch.autocast("cuda", torch.bfloat16, enabled=not wide):
            loss = linear_cross_entropy(*leaves, targets_N, KIND, logits_at_once=at_once)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for name, got, expected in zip(("loss", "hidden", "weight"), *found, strict=True):
        assert got is not None
        assert expected is not None
        assert_close(name, got.double(), expected, 2e-2)
    assert found[0][2].dtype == dtype
