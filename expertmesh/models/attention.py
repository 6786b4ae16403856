"""Causal attention whose key and value heads serve groups of query heads."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from expertmesh.models.context import BlockContext
from expertmesh.models.norm import RMSNorm
from expertmesh.models.rotary import rotate_halves

QKNorm = Literal["none", "head", "full"]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Scaled dot product attention over shared key and value heads.

    Args:
        q: ``(B, H, S, A)``.
        k: ``(B, G, P + S, A)``; head h of ``q`` uses head ``h // (H / G)``.
        v: ``(B, G, P + S, V)``.
        mask: Bool, True where a query may look; None means causal for S > 1, all for S = 1.
        scale: Multiplies the scores; None means ``A ** -0.5``.

    Returns:
        ``(B, S, H * V)``.
    """
    group = q.shape[1] // k.shape[1]
    if mask is not None and group > 1:
        # The kernels that take a mask do not take groups: torch would fall back to the one that
        # stores all scores.
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    causal = mask is None and q.shape[2] > 1
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1
    )
    return y.transpose(1, 2).flatten(2)


class GroupedAttention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023); the usual one with as many KV heads as heads.

    Queries and keys may be normalised before they are turned: each head by itself (Qwen3), or the
    whole projection (OLMoE).

    Args:
        dim: Model width D.
        num_heads: Query heads H.
        num_kv_heads: Key and value heads G; divides H.
        head_dim: Width of a head.
        index: The block's index, which names its part of the cache.
        qk_norm: ``"none"``, ``"head"`` or ``"full"``.
        norm_eps: Of these norms.
        scale: Multiplies the scores; None means ``head_dim ** -0.5``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        index: int,
        *,
        qk_norm: QKNorm = "none",
        norm_eps: float = 1e-6,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.scale = scale
        self.index = index
        self.q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.v = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.q_norm = _norm_of(qk_norm, num_heads, head_dim, norm_eps)
        self.k_norm = _norm_of(qk_norm, num_kv_heads, head_dim, norm_eps)

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x_BSD: ``(B, S, D)``.
            context: What the blocks share.

        Returns:
            ``(B, S, D)``.
        """
        q = self._heads(self.q(x_BSD), self.q_norm)
        k = self._heads(self.k(x_BSD), self.k_norm)
        v = self._heads(self.v(x_BSD), None)
        if context.rotation is not None:
            q, k = rotate_halves(q, context.rotation), rotate_halves(k, context.rotation)
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.index)
        return self.out(attend(q, k, v, context.attention_mask, self.scale))

    def _heads(self, y: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalise and split: ``(B, S, H * A)`` to ``(B, H, S, A)``."""
        if norm is not None:
            y = norm(y.unflatten(-1, (-1, norm.normalized_shape[0]))).flatten(-2)
        return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _norm_of(kind: QKNorm, num_heads: int, head_dim: int, eps: float) -> RMSNorm | None:
    """One scale for all heads, one for each channel of the projection, or none."""
    if kind == "none":
        return None
    return RMSNorm(head_dim if kind == "head" else num_heads * head_dim, eps)
