"""Sums of a few rows each, read from where they lie and added in a fixed order."""

import torch
from torch import Tensor

from expertmesh.kernels.triton_support import on_its_device, triton_refusal


def sum_rows(rows_NX: Tensor, place_TJ: Tensor, dtype: torch.dtype) -> Tensor:
    """``out[t] = sum_j rows[place[t, j]]``, in float32 or wider and by ascending j.

    Args:
        rows_NX: ``(N, X)``.
        place_TJ: int64 or int32, below N; negative ones are left out.
        dtype: Of the sums, rounded once.

    Returns:
        ``(T, X)``; 0 for a t without a place.
    """
    out_TX = rows_NX.new_empty(len(place_TJ), rows_NX.shape[1], dtype=dtype)
    if rows_NX.numel() == 0 or out_TX.numel() == 0:
        return out_TX.zero_()
    if _in_one_launch(rows_NX, dtype):
        from expertmesh.kernels.choice_sum import sum_choices

        return on_its_device(sum_choices)(rows_NX.contiguous(), place_TJ.contiguous(), out_TX)
    chosen_TJX = rows_NX.index_select(0, place_TJ.clamp_min(0).reshape(-1))
    chosen_TJX = chosen_TJX.view(*place_TJ.shape, rows_NX.shape[1])
    chosen_TJX = chosen_TJX.masked_fill_(place_TJ.unsqueeze(2) < 0, 0)
    wide = torch.promote_types(torch.float32, dtype)
    return chosen_TJX.sum(dim=1, dtype=wide).to(dtype)


def _in_one_launch(rows_NX: Tensor, dtype: torch.dtype) -> bool:
    if rows_NX.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    wide = torch.float64 in (rows_NX.dtype, dtype)
    return not wide and triton_refusal(rows_NX.device) is None
