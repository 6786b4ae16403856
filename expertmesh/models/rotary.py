"""Rotary positions (Su et al., 2021), computed from the positions at hand.

No table is stored: nothing must be rebuilt after ``to_empty``, and no length is the longest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of each position's angles, ``(B or 1, 1, S, dim / 2)`` each."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> "Rotation":
        """The angles ``position * theta ** (-2 i / dim)`` for i below ``dim / 2``.

        Args:
            positions: int64, ``(B or 1, S)``.
            dim: Width of the vectors that are turned; even.
            theta: Base of the wavelengths.
            dtype: The model's type. Angles are in float32, or in float64 if that is the type.
        """
        wide = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim
        angle = positions[:, None, :, None].to(wide) * theta**-exponent
        return Rotation(angle.cos(), angle.sin())


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs ``(x[i], x[i + dim / 2])``: the layout of Mixtral, OLMoE and Qwen3.

    Args:
        x: ``(B, H, S, dim)``.
        rotation: Of the same ``S`` and ``dim``.

    Returns:
        ``(B, H, S, dim)`` in ``x``'s type.
    """
    first, second = x.chunk(2, dim=-1)
    turned = _turn(first, second, rotation)
    return torch.cat(turned, dim=-1).to(x.dtype)


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs ``(x[2 i], x[2 i + 1])``: the layout of DeepSeek-V2.

    Args:
        x: ``(B, H, S, dim)``.
        rotation: Of the same ``S`` and ``dim``.

    Returns:
        ``(B, H, S, dim)`` in ``x``'s type.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = _turn(first, second, rotation)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def _turn(first: Tensor, second: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    cos, sin = rotation.cos, rotation.sin
    return first * cos - second * sin, second * cos + first * sin
