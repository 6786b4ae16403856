"""Rotary positions (Su et al., 2021), computed from the positions at hand.

No table is stored: nothing must be rebuilt after ``to_empty``, and no length is the longest.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# An operation, which a compiler leaves whole: of its parts Inductor would compute every angle anew
# for each head of each block, four times as long as turning takes. Defined with
# ``torch.library.define``: ``custom_op`` imports the compiler at the first call.
torch.library.define(
    "expertmesh::cos_and_sin",
    "(Tensor positions, int dim, float theta, ScalarType dtype) -> (Tensor, Tensor)",
)


@torch.library.impl("expertmesh::cos_and_sin", "CompositeExplicitAutograd")
def _cos_and_sin(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=dtype) / dim
    angle = positions[:, None, :, None].to(dtype) * theta**-exponent
    return angle.cos(), angle.sin()


@torch.library.register_fake("expertmesh::cos_and_sin")
def _cos_and_sin_fake(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, length = positions.shape
    cos = positions.new_empty(batch, 1, length, dim // 2, dtype=dtype)
    return cos, torch.empty_like(cos)


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
        return Rotation(*torch.ops.expertmesh.cos_and_sin(positions, dim, theta, wide))


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs ``(x[i], x[i + dim / 2])``: the layout of Mixtral, OLMoE and Qwen3.

    Args:
        x: ``(B, H, S, dim)``.
        rotation: Of the same ``S`` and ``dim``.

    Returns:
        ``(B, H, S, dim)`` in ``x``'s type.
    """
    turned: Tensor = _Halves.apply(x, rotation.cos, rotation.sin)
    return turned


def rotate_pairs(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs ``(x[2 i], x[2 i + 1])``: the layout of DeepSeek-V2.

    Args:
        x: ``(B, H, S, dim)``.
        rotation: Of the same ``S`` and ``dim``.

    Returns:
        ``(B, H, S, dim)`` in ``x``'s type.
    """
    turned: Tensor = _Pairs.apply(x, rotation.cos, rotation.sin)
    return turned


class _Halves(torch.autograd.Function):
    """The gradient of turning is turning back: nothing of ``x`` is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        return torch.cat(_turn(first, second, cos, sin), dim=-1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Halves.apply(dy, cos, -sin), None, None


class _Pairs(torch.autograd.Function):
    """The same for neighbours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack(_turn(first, second, cos, sin), dim=-1).flatten(-2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Pairs.apply(dy, cos, -sin), None, None


def _turn(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Computed in the angles' type."""
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    across = torch.addcmul(second * cos, first, sin)
    return turned.to(first.dtype), across.to(first.dtype)
