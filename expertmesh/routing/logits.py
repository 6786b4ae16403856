"""Router inputs and logits: padding blanked, products in float32 or wider."""

import torch
from torch import Tensor


def without_padding(x_TD: Tensor, padding_mask: Tensor | None) -> Tensor:
    """``(T, D)`` with zeros where padding stands, which may hold anything, NaN included."""
    if padding_mask is None:
        return x_TD
    return torch.where(padding_mask[:, None], torch.zeros_like(x_TD), x_TD)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest of the tensors' dtypes and float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def wide_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """``x W^T``, ``(T, E)`` in float32 or wider; autocast must be off."""
    wide = wide_dtype(x_TD, weight_ED)
    return x_TD.to(wide) @ weight_ED.to(wide).T


_EPSILON = 1e-6
"""Added to squared norms, so that a token of zeros has one."""


def unit(value: Tensor, dim: int) -> Tensor:
    """Vectors along ``dim`` with norm 1; smoothly shorter where they all but vanish.

    A zero has no direction: it stays zero, with a gradient of at most 1e3 times what comes back.
    """
    return value * (value.square().sum(dim=dim, keepdim=True) + _EPSILON).rsqrt()


def coarse(value: Tensor) -> Tensor:
    """Float32 values rounded to 12 bits of mantissa.

    Two tokens that are equal to the model get scores that differ by rounding, and rounding differs
    with the shapes of matrix products, that is with the mesh. It must not decide between them.
    """
    bits = value.to(torch.float32).view(torch.int32)
    return ((bits + (1 << 11)) & -(1 << 12)).view(torch.float32)
