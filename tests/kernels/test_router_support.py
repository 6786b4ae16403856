"""For which operands the router's kernels are taken, and what is said of others."""

import pytest
import torch

from expertmesh.kernels import triton_support
from expertmesh.kernels.router import counts, logits_refusal, serves, statistics_refusal

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "TRITON_VERSION", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "num_experts", "reason"),
    [
        (torch.bfloat16, torch.float32, 1024, None),
        (torch.bfloat16, torch.bfloat16, 1, None),
        (torch.float32, torch.float32, 8, "take bfloat16 tokens, not torch.float32"),
        (torch.bfloat16, torch.float64, 8, "float32 weights, not torch.float64"),
        (torch.bfloat16, torch.float32, 1025, "at most 1024 experts, got 1025"),
    ],
)
def test_logits(
    dtype: torch.dtype, weight_dtype: torch.dtype, num_experts: int, reason: str | None
) -> None:
    refusal = logits_refusal(CUDA, dtype, weight_dtype, num_experts)
    assert refusal is None if reason is None else reason in str(refusal)


def test_statistics() -> None:
    assert statistics_refusal(CUDA, torch.float32, 1024) is None
    assert "float32 scores, not torch.float64" in str(statistics_refusal(CUDA, torch.float64, 8))
    assert "at most 1024 experts" in str(statistics_refusal(CUDA, torch.float32, 1025))


def test_what_triton_cannot_do_the_router_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for refusal in (
        logits_refusal(CUDA, torch.bfloat16, torch.float32, 8),
        statistics_refusal(CUDA, torch.float32, 8),
    ):
        assert refusal is not None
        assert "compute capability 8.0" in refusal


def test_the_cpu_and_nothing_at_all_go_by_torch() -> None:
    x_TD, weight_ED = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(2, 4)
    assert not serves(x_TD, weight_ED)
    assert not serves(x_TD[:0], weight_ED)
    assert not counts(torch.zeros(3, 2))
    assert logits_refusal(x_TD.device, x_TD.dtype, weight_ED.dtype, 2) == "its kernels are for GPUs"
