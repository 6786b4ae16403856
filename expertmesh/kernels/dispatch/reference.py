"""The definitions, in torch: many small operations, which a GPU does one after the other.

What they mean stands with the functions of the same names in ``op.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.kernels.grouping import group_by_expert

ID = torch.int32
"""Of expert ids on their way."""


class Places(NamedTuple):
    """Outgoing rows, those for rank 0 first; for one rank by token.

    Integers are int64 or int32.

    Attributes:
        token_N: The token of each outgoing row, N = T J. Those from ``offset_P1[-1]`` on hold
            anything.
        place_TJ: The outgoing row of each destination of each token, -1 where there is none.
        offset_P1: Ends of the ranks' spans behind a leading 0, int32 ``(P + 1,)``.
    """

    token_N: Tensor
    place_TJ: Tensor
    offset_P1: Tensor


def destinations(expert_TK: Tensor, num_local: int, ep: int, etp: int) -> Tensor:
    """See ``op.destinations``."""
    owner_TK, num_ranks = expert_TK // num_local, ep * etp
    if ep <= expert_TK.shape[1]:
        rank_J = torch.arange(num_ranks, device=expert_TK.device)
        goes_TJ = (owner_TK.unsqueeze(2) == rank_J // etp).any(dim=1)
        return torch.where(goes_TJ, rank_J, num_ranks)
    # A rank that an earlier choice of the token named already is left out.
    same_TKK = owner_TK.unsqueeze(2) == owner_TK.unsqueeze(1)
    owner_TK = owner_TK.masked_fill(same_TKK.tril(-1).any(dim=2), ep)
    slice_S = torch.arange(etp, device=expert_TK.device)
    rank_TKS = owner_TK.unsqueeze(2) * etp + slice_S
    return rank_TKS.clamp_max(num_ranks).flatten(1)


def places(rank_TJ: Tensor, num_ranks: int) -> Places:
    """See ``op.places``."""
    grouping = group_by_expert(rank_TJ, num_ranks)
    place_TJ = torch.where(grouping.valid_RK, grouping.inverse_RK, -1)
    return Places(grouping.row_N, place_TJ, torch.nn.functional.pad(grouping.offsets_E, (1, 0)))


def take_rows(value_TX: Tensor, token_N: Tensor, empty_N: Tensor | None, fill: float) -> Tensor:
    """See ``op.take_rows``."""
    if empty_N is None:
        return value_TX.index_select(0, token_N)
    if len(value_TX) == 0:
        return value_TX.new_full((len(token_N), *value_TX.shape[1:]), fill)
    return value_TX.index_select(0, token_N).masked_fill_(empty_N.unsqueeze(1), fill)


def pack_choices(
    expert_TK: Tensor, weight_TK: Tensor, token_N: Tensor, empty_N: Tensor | None, sentinel: int
) -> Tensor:
    """See ``op.pack_choices``."""
    id_NK = take_rows(expert_TK, token_N, empty_N, sentinel).to(ID)
    weight_NK = take_rows(weight_TK, token_N, empty_N, 0)
    return torch.cat([id_NK.view(torch.uint8), weight_NK.view(torch.uint8)], dim=1)


def unpack_choices(
    choice_RB: Tensor, first: int, num_local: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See ``op.unpack_choices``."""
    k = choice_RB.shape[1] // (ID.itemsize + dtype.itemsize)
    # Copies: bytes between others may not begin where wider numbers must.
    id_RB, weight_RB = (
        part_RB.clone(memory_format=torch.contiguous_format)
        for part_RB in choice_RB.split([k * ID.itemsize, k * dtype.itemsize], dim=1)
    )
    id_RK = id_RB.view(ID).to(torch.int64) - first
    here_RK = (id_RK >= 0) & (id_RK < num_local)
    id_RK = torch.where(here_RK, id_RK, num_local)
    return id_RK, mask_others(weight_RB.view(dtype), id_RK, num_local)


def mask_others(value_RK: Tensor, id_RK: Tensor, num_local: int) -> Tensor:
    """See ``op.mask_others``."""
    return torch.where(id_RK < num_local, value_RK, 0)
