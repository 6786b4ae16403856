"""Which implementation is for which tensors: kernels on a GPU that has Triton, else torch.

All give the same bits, up to the width of integers where it says so. A mesh refuses
``torch.compile``; what is traced all the same takes torch's operations.
"""

import torch
from torch import Tensor

from expertmesh.kernels.dispatch import reference
from expertmesh.kernels.dispatch.reference import Places
from expertmesh.kernels.triton_support import triton_refusal


def destinations(expert_TK: Tensor, num_local: int, ep: int, etp: int) -> Tensor:
    """The ranks that a token goes to, each once.

    Args:
        expert_TK: Expert ids; ``num_local * ep`` marks choices that are not carried out.
        num_local: Experts of one rank.
        ep: Ranks among which experts are dealt out.
        etp: Slices of each expert, on ranks that follow each other.

    Returns:
        int64 ``(T, J)``, J the lesser of ``ep * etp`` and ``K * etp``; ``ep * etp`` where there is
        nothing to send. By ascending rank where J is the number of ranks, else by choice.
    """
    if _by_kernels(expert_TK):
        from expertmesh.kernels.dispatch import kernels

        return kernels.destinations(expert_TK, num_local, ep, etp)
    return reference.destinations(expert_TK, num_local, ep, etp)


def places(rank_TJ: Tensor, num_ranks: int) -> Places:
    """Which outgoing row carries which token.

    Args:
        rank_TJ: Where tokens go; ``num_ranks`` for nowhere.
        num_ranks: P.

    Returns:
        int32 from kernels, else int64.
    """
    if _by_kernels(rank_TJ):
        from expertmesh.kernels.dispatch import kernels

        return kernels.places(rank_TJ, num_ranks)
    return reference.places(rank_TJ, num_ranks)


def take_rows(value_TX: Tensor, token_N: Tensor, empty_N: Tensor | None, fill: float) -> Tensor:
    """The tokens' values by outgoing row.

    Args:
        value_TX: ``(T, X)``.
        token_N: int64 or int32; may be beyond T where a row is empty and T is 0.
        empty_N: True where a row carries no token; None if every row does.
        fill: What stands in empty rows.

    Returns:
        ``(N, X)``.
    """
    return reference.take_rows(value_TX, token_N, empty_N, fill)


def pack_choices(
    expert_TK: Tensor, weight_TK: Tensor, token_N: Tensor, empty_N: Tensor | None, sentinel: int
) -> Tensor:
    """Ids and combine weights by outgoing row, to be sent together.

    Args:
        expert_TK: Expert ids.
        weight_TK: Their weights, of any dtype.
        token_N: As in ``take_rows``.
        empty_N: Rows without a token, whose ids are the sentinel and whose weights are 0.
        sentinel: The id that means no expert.

    Returns:
        uint8 ``(N, B)``: K ids as int32 and then K weights, in the device's order of bytes.
    """
    if _by_kernels(expert_TK, weight_TK, token_N):
        from expertmesh.kernels.dispatch import kernels

        return kernels.pack_choices(expert_TK, weight_TK, token_N, empty_N, sentinel)
    return reference.pack_choices(expert_TK, weight_TK, token_N, empty_N, sentinel)


def unpack_choices(
    choice_RB: Tensor, first: int, num_local: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What ``pack_choices`` packed, as far as it concerns the experts of one rank.

    Args:
        choice_RB: uint8.
        first: The rank's first expert.
        num_local: L, its experts.
        dtype: Of the weights.

    Returns:
        Ids among the rank's own, int64 ``(R, K)``, L for those of other ranks; and the weights
        ``(R, K)``, 0 there.
    """
    if dtype == torch.float32 and _by_kernels(choice_RB):
        from expertmesh.kernels.dispatch import kernels

        return kernels.unpack_choices(choice_RB, first, num_local)
    return reference.unpack_choices(choice_RB, first, num_local, dtype)


def mask_others(value_RK: Tensor, id_RK: Tensor, num_local: int) -> Tensor:
    """Values of a rank's own choices, 0 for other ranks': whatever stands there is left out.

    Args:
        value_RK: Of any dtype.
        id_RK: What ``unpack_choices`` gives.
        num_local: L.
    """
    if _by_kernels(id_RK, value_RK):
        from expertmesh.kernels.dispatch import kernels

        return kernels.mask_others(value_RK, id_RK, num_local)
    return reference.mask_others(value_RK, id_RK, num_local)


def _by_kernels(ids: Tensor, weight: Tensor | None = None, *others: Tensor) -> bool:
    if not _has_kernels(ids.device):
        return False
    if weight is not None and weight.dtype != torch.float32:
        return False
    return all(tensor.numel() > 0 for tensor in (ids, *others))


def _has_kernels(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return triton_refusal(device) is None
