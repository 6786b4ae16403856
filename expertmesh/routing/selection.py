"""Integer bookkeeping of routing: top-k with a tie rule, counts, ranks within an expert."""

import torch
from torch import Tensor


def top_k(score_TE: Tensor, k: int) -> Tensor:
    """The k experts of highest score, highest first; ties go to the lowest expert index.

    ``torch.topk`` leaves the order of ties open and breaks them otherwise on other devices.

    Args:
        score_TE: ``(T, E)`` float32 or float64.
        k: Between 1 and E.

    Returns:
        int64 ``(T, k)``.
    """
    if score_TE.dtype == torch.float64:
        # Too wide to be packed with an index; a stable sort keeps equal ones in their order.
        best_TE = score_TE.sort(dim=-1, descending=True, stable=True).indices
        return best_TE.narrow(-1, 0, k)
    # A float32 and the reversed expert index packed into one integer that sorts as the pair does:
    # one top-k of integers costs half of a stable sort. Adding 0.0 turns -0 into +0.
    num_experts = score_TE.shape[-1]
    bits_TE = (score_TE + 0.0).view(torch.int32).to(torch.int64)
    ordered_TE = torch.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    reversed_E = torch.arange(num_experts - 1, -1, -1, device=score_TE.device)
    packed_TK = ((ordered_TE << 32) | reversed_E).topk(k, dim=-1).values
    return num_experts - 1 - (packed_TK & 0xFFFFFFFF)


def count_experts(expert_TK: Tensor, num_experts: int) -> Tensor:
    """Choices per expert, sentinels left out.

    Args:
        expert_TK: int64 of any shape, values in [0, E].
        num_experts: E.

    Returns:
        int64 ``(E,)``.
    """
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_TK.device)
    flat = expert_TK.reshape(-1)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def rank_within(bucket_N: Tensor, num_buckets: int) -> Tensor:
    """The number of earlier entries of the same bucket, for each entry. Integers, so exact.

    Args:
        bucket_N: int64 ``(N,)``, values in [0, num_buckets).
        num_buckets: Number of buckets.

    Returns:
        int64 ``(N,)``.
    """
    order_N = bucket_N.argsort(stable=True)
    count_B = count_experts(bucket_N, num_buckets)
    start_B = count_B.cumsum(0) - count_B
    sorted_rank_N = torch.arange(len(bucket_N), device=bucket_N.device) - start_B[bucket_N[order_N]]
    return torch.empty_like(sorted_rank_N).scatter_(0, order_N, sorted_rank_N)
