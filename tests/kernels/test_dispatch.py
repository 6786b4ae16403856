"""What dispatch does with ids, weights and places: torch's operations against lists, kernels
under Triton's interpreter against torch's operations."""

import pytest
import torch
from torch import Tensor

from expertmesh.kernels import dispatch
from expertmesh.kernels.dispatch import kernels, reference

SHAPES = [(1, 1), (7, 3), (40, 8), (130, 5)]


def choices(num_tokens: int, k: int, num_experts: int, sentinels: float = 0.2) -> Tensor:
    """Different experts for each token, the sentinel for a part of the choices."""
    g = torch.Generator().manual_seed(num_tokens * k)
    expert_TK = torch.rand(num_tokens, num_experts, generator=g).argsort(dim=1)[:, :k]
    dropped_TK = torch.rand(num_tokens, k, generator=g) < sentinels
    return expert_TK.masked_fill(dropped_TK, num_experts)


def weights(like_TK: Tensor, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(like_TK.shape, generator=g, dtype=torch.float64).to(dtype)


def picked(num_tokens: int, empty: bool) -> tuple[Tensor, Tensor | None]:
    """Tokens of some rows, and which of the rows are empty."""
    g = torch.Generator().manual_seed(2)
    token_N = torch.randint(0, num_tokens, (2 * num_tokens + 1,), generator=g)
    return token_N, torch.rand(len(token_N), generator=g) < 0.3 if empty else None


@pytest.mark.parametrize(("ep", "etp"), [(1, 2), (2, 1), (4, 1), (2, 2), (4, 3), (8, 1), (8, 2)])
@pytest.mark.parametrize(("num_tokens", "k"), SHAPES)
def test_destinations_and_places(num_tokens: int, k: int, ep: int, etp: int) -> None:
    expert_TK = choices(num_tokens, k, 8)
    rank_TJ = reference.destinations(expert_TK, 8 // ep, ep, etp)
    ours_TJ = kernels.destinations(expert_TK, 8 // ep, ep, etp)
    assert torch.equal(ours_TJ, rank_TJ)
    assert ours_TJ.dtype == torch.int64

    num_ranks = ep * etp
    ours, expected = kernels.places(rank_TJ, num_ranks), reference.places(rank_TJ, num_ranks)
    assert torch.equal(ours.offset_P1, expected.offset_P1)
    assert ours.offset_P1.dtype == expected.offset_P1.dtype == torch.int32
    assert torch.equal(ours.place_TJ.long(), expected.place_TJ)
    end = int(expected.offset_P1[-1])
    assert torch.equal(ours.token_N[:end].long(), expected.token_N[:end])


def test_places_are_by_rank_and_token() -> None:
    rank_TJ = torch.tensor([[1, 2], [0, 2], [2, 2], [0, 1]])
    token_N, place_TJ, offset_P1 = dispatch.places(rank_TJ, 2)
    assert offset_P1.tolist() == [0, 2, 4]
    assert token_N[:4].tolist() == [1, 3, 0, 3]
    assert place_TJ.tolist() == [[2, -1], [0, -1], [-1, -1], [1, 3]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("num_tokens", "k"), SHAPES)
def test_packed_choices_come_out_as_they_went_in(
    num_tokens: int, k: int, empty: bool, dtype: torch.dtype
) -> None:
    expert_TK = choices(num_tokens, k, 12)
    weight_TK = weights(expert_TK, dtype)
    token_N, empty_N = picked(num_tokens, empty)
    choice_NB = dispatch.pack_choices(expert_TK, weight_TK, token_N, empty_N, 12)
    assert choice_NB.shape == (len(token_N), k * (4 + dtype.itemsize))
    id_NK, weight_NK = dispatch.unpack_choices(choice_NB, 4, 3, dtype)
    assert (id_NK.dtype, weight_NK.dtype) == (torch.int64, dtype)
    for row, token in enumerate(token_N.tolist()):
        for choice in range(k):
            expert, weight = int(expert_TK[token, choice]), weight_TK[token, choice]
            here = 4 <= expert < 7 and not (empty_N is not None and empty_N[row])
            assert id_NK[row, choice] == (expert - 4 if here else 3)
            assert weight_NK[row, choice] == (weight if here else 0)


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize(("num_tokens", "k"), SHAPES)
def test_kernels_pack_and_unpack_the_same_bits(
    num_tokens: int, k: int, empty: bool, index: torch.dtype
) -> None:
    expert_TK = choices(num_tokens, k, 12)
    weight_TK = weights(expert_TK, torch.float32)
    weight_TK[0, 0] = torch.nan
    token_N, empty_N = picked(num_tokens, empty)
    given = (expert_TK.to(index), weight_TK, token_N.to(index), empty_N, 12)
    choice_NB = kernels.pack_choices(*given)
    assert torch.equal(choice_NB, reference.pack_choices(*given))
    for first in (0, 4, 9):
        id_NK, weight_NK = kernels.unpack_choices(choice_NB, first, 3)
        expected = reference.unpack_choices(choice_NB, first, 3, torch.float32)
        assert torch.equal(id_NK, expected[0])
        assert id_NK.dtype == torch.int64
        assert torch.equal(weight_NK.view(torch.int32), expected[1].view(torch.int32))


def test_other_strides() -> None:
    expert_TK = choices(4, 6, 8).T
    weight_TK = weights(expert_TK.T, torch.float32).T
    token_N, _ = picked(6, empty=False)
    given = (expert_TK, weight_TK, token_N, None, 8)
    expected_NB = reference.pack_choices(
        expert_TK.contiguous(), weight_TK.contiguous(), token_N, None, 8
    )
    assert torch.equal(kernels.pack_choices(*given), expected_NB)
    assert torch.equal(reference.pack_choices(*given), expected_NB)
    plain_TJ = reference.destinations(expert_TK.contiguous(), 2, 4, 1)
    assert torch.equal(kernels.destinations(expert_TK, 2, 4, 1), plain_TJ)
    masked_TK = kernels.mask_others(weight_TK, expert_TK, 3)
    assert torch.equal(masked_TK, reference.mask_others(weight_TK, expert_TK, 3))


def test_what_is_other_ranks_is_left_out_whatever_it_is() -> None:
    id_RK = torch.tensor([[0, 2], [2, 1]])
    value_RK = torch.tensor([[1.0, torch.nan], [torch.inf, -2.0]])
    for mask in (dispatch.mask_others, reference.mask_others, kernels.mask_others):
        assert mask(value_RK, id_RK, 2).tolist() == [[1.0, 0.0], [0.0, -2.0]]
    spread_RK = torch.ones(()).expand(2, 2)
    assert kernels.mask_others(spread_RK, id_RK, 2).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 3])
def test_nothing(k: int, dtype: torch.dtype) -> None:
    expert_TK, nowhere_N = torch.empty(0, k, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    weight_TK = torch.empty(0, k, dtype=dtype)
    token_N, place_TJ, offset_P1 = dispatch.places(dispatch.destinations(expert_TK, 2, 2, 2), 4)
    assert (len(token_N), len(place_TJ), offset_P1.tolist()) == (0, 0, [0] * 5)
    choice_NB = dispatch.pack_choices(expert_TK, weight_TK, nowhere_N, None, 4)
    id_NK, weight_NK = dispatch.unpack_choices(choice_NB, 0, 2, dtype)
    assert id_NK.shape == weight_NK.shape == (0, k)
    assert weight_NK.dtype == dtype
    # No tokens, but rows that have to be sent: they are empty.
    empty_N = torch.ones(3, dtype=torch.bool)
    token_N = torch.zeros(3, dtype=torch.int64)
    choice_NB = dispatch.pack_choices(expert_TK, weight_TK, token_N, empty_N, 4)
    id_NK, weight_NK = dispatch.unpack_choices(choice_NB, 2, 2, dtype)
    assert id_NK.tolist() == [[2] * k] * 3
    assert not weight_NK.any()
    assert dispatch.take_rows(weight_TK, token_N, empty_N, 7).tolist() == [[7.0] * k] * 3
