"""Dtypes: what ``torch.autocast`` asks for, and conversion, for functions that choose their own."""

from contextlib import nullcontext

import torch
from torch import Tensor


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast is on with for a device type; None where it is off."""
    if device_type == "meta":  # knows no autocast; asking which types do does not trace in 2.11
        return None
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None


def without_autocast(device_type: str) -> "torch.autocast | nullcontext[None]":
    """A context in which autocast changes nothing; free where it is off already."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, and ``x`` itself where it has that dtype already.

    torch 2.11 compiles a function whose output ends in a conversion to its own dtype to one whose
    gradient is zero.
    """
    return x if x.dtype == dtype else x.to(dtype)
