"""Dispatch's kernels on a GPU against torch's operations: the same bits, and no waiting."""

import pytest
import torch
from torch import Tensor

from expertmesh.kernels import dispatch
from expertmesh.kernels.dispatch import reference

pytestmark = pytest.mark.gpu

EXPERTS = 64


def case(num_tokens: int, k: int, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Different experts for each token, a part of them sentinels; and weights."""
    torch.manual_seed(0)
    expert_TK = torch.rand(num_tokens, EXPERTS, device="cuda").argsort(dim=1)[:, :k]
    expert_TK = expert_TK.masked_fill(
        torch.rand_like(expert_TK, dtype=torch.float32) < 0.1, EXPERTS
    )
    return expert_TK, torch.randn(num_tokens, k, device="cuda", dtype=weight_dtype)


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (4, 1), (8, 1), (16, 1), (2, 2), (16, 4)])
@pytest.mark.parametrize(("num_tokens", "k"), [(0, 8), (1, 8), (1000, 6), (20_000, 8), (500, 1)])
def test_destinations_and_places(num_tokens: int, k: int, ep: int, etp: int) -> None:
    expert_TK, _ = case(num_tokens, k, torch.float32)
    rank_TJ = dispatch.destinations(expert_TK, EXPERTS // ep, ep, etp)
    expected_TJ = reference.destinations(expert_TK, EXPERTS // ep, ep, etp)
    assert torch.equal(rank_TJ, expected_TJ)
    ours = dispatch.places(rank_TJ, ep * etp)
    expected = reference.places(expected_TJ, ep * etp)
    assert torch.equal(ours.offset_P1, expected.offset_P1)
    assert torch.equal(ours.place_TJ.long(), expected.place_TJ)
    end = int(expected.offset_P1[-1])
    assert torch.equal(ours.token_N[:end].long(), expected.token_N[:end])


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "k"), [(1, 1), (1000, 6), (20_000, 8)])
def test_choices(
    num_tokens: int, k: int, dtype: torch.dtype, empty: bool, index: torch.dtype
) -> None:
    expert_TK, weight_TK = case(num_tokens, k, dtype)
    token_N = torch.randint(0, num_tokens, (2 * num_tokens + 1,), device="cuda").to(index)
    empty_N = torch.rand(len(token_N), device="cuda") < 0.3 if empty else None
    given = (expert_TK, weight_TK, token_N, empty_N, EXPERTS)
    choice_NB = dispatch.pack_choices(*given)
    assert torch.equal(choice_NB, reference.pack_choices(*given))
    id_NK, weight_NK = dispatch.unpack_choices(choice_NB, 16, 16, dtype)
    expected = reference.unpack_choices(choice_NB, 16, 16, dtype)
    assert torch.equal(id_NK, expected[0])
    assert torch.equal(weight_NK, expected[1])
    assert (id_NK.dtype, weight_NK.dtype) == (torch.int64, dtype)
    value_NK = torch.where(id_NK < 16, torch.randn_like(weight_NK), torch.nan)
    masked_NK = dispatch.mask_others(value_NK, id_NK, 16)
    assert torch.equal(masked_NK, reference.mask_others(value_NK, id_NK, 16))
    assert not masked_NK.isnan().any()


def everything(expert_TK: Tensor, weight_TK: Tensor, x_TD: Tensor, num_rows: int) -> None:
    """What a rank does from its router to its experts, but for the exchanges."""
    rank_TJ = dispatch.destinations(expert_TK, EXPERTS // 4, 4, 1)
    token_N, _, _ = dispatch.places(rank_TJ, 4)
    token_N = token_N[:num_rows]
    dispatch.take_rows(x_TD, token_N, None, 0)
    choice_NB = dispatch.pack_choices(expert_TK, weight_TK, token_N, None, EXPERTS)
    id_NK, weight_NK = dispatch.unpack_choices(choice_NB, 16, 16, torch.float32)
    dispatch.mask_others(weight_NK, id_NK, 16)


def test_nothing_waits_for_the_device() -> None:
    expert_TK, weight_TK = case(3000, 8, torch.float32)
    x_TD = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16)
    rank_TJ = reference.destinations(expert_TK, EXPERTS // 4, 4, 1)
    num_rows = int((rank_TJ < 4).sum())
    everything(expert_TK, weight_TK, x_TD, num_rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(expert_TK, weight_TK, x_TD, num_rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_few_launches() -> None:
    expert_TK, weight_TK = case(3000, 8, torch.float32)
    x_TD = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16)
    everything(expert_TK, weight_TK, x_TD, 3000)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        everything(expert_TK, weight_TK, x_TD, 3000)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert 0 < len(launched) <= 9, launched
