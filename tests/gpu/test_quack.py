"""The backend ``quack`` on a GPU that has the package: gradients, empty experts, the same bits."""

import pytest
import torch

from expertmesh.kernels.moe_mlp.quack import QUACK_MISSING
from tests.kernels.cases import Case, assert_equal_to_reference, make_case, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(QUACK_MISSING is not None, reason=str(QUACK_MISSING)),
]

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3}


def cuda_case(dtype: torch.dtype = torch.bfloat16, **shape: object) -> Case:
    usual = {"rows": 1500, "dim": 264, "hidden": 200, "num_experts": 6, "k": 2}
    return make_case(**usual | shape, dtype=dtype).to(device="cuda")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_matches_reference(dtype: torch.dtype, gated: bool) -> None:
    """Experts with odd numbers of rows, one without any, some choices of none."""
    assert_equal_to_reference(cuda_case(dtype, gated=gated), "quack", TOLERANCE[dtype])


def test_nearly_all_rows_of_one_expert() -> None:
    case = cuda_case(rows=2000, dim=128, hidden=256, num_experts=8, sentinels=0.0)
    case.expert[5:] = 3
    assert_equal_to_reference(case, "quack")


def test_no_choice_at_all() -> None:
    assert_equal_to_reference(cuda_case(sentinels=1.0), "quack")


def test_same_bits_every_time() -> None:
    case = cuda_case(dim=512, hidden=256, bias=False)
    first, second = run(case, "quack"), run(case, "quack")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
