"""Multi-head latent attention: keys and values rebuilt from one small vector per position."""

import torch
from torch import Tensor, nn

from expertmesh.models.attention import attend
from expertmesh.models.context import BlockContext
from expertmesh.models.norm import RMSNorm
from expertmesh.models.rotary import rotate_pairs


class LatentAttention(nn.Module):
    """Attention of DeepSeek-V2 (arXiv 2405.04434, section 2.1), with plain rotary positions.

    The cache holds the normalised latent and the one turned key that all heads share. The released
    checkpoints stretch their angles for long contexts (YaRN); that is not done here, so they agree
    up to the length they were first trained on only if the stretching is left out as well.

    Args:
        dim: Model width D.
        num_heads: Heads H.
        q_lora_rank: Width of the queries' latent; None projects queries directly.
        kv_lora_rank: Width of the latent of keys and values.
        qk_nope_head_dim: The part of a head's query and key that is not turned.
        qk_rope_head_dim: The part that is turned; the key's is shared by all heads.
        v_head_dim: Width of a head's value.
        index: The block's index, which names its part of the cache.
        norm_eps: Of the latents' norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        index: int,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_split = (qk_nope_head_dim, qk_rope_head_dim)
        self.kv_split = (qk_nope_head_dim, v_head_dim)
        self.latent_split = (kv_lora_rank, qk_rope_head_dim)
        self.index = index
        q_dim = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.q: nn.Module
        if q_lora_rank is None:
            self.q = nn.Linear(dim, q_dim, bias=False)
        else:
            self.q = nn.Sequential(
                nn.Linear(dim, q_lora_rank, bias=False),
                RMSNorm(q_lora_rank, norm_eps),
                nn.Linear(q_lora_rank, q_dim, bias=False),
            )
        self.kv_down = nn.Linear(dim, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_up = nn.Linear(
            kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False
        )
        self.out = nn.Linear(num_heads * v_head_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x_BSD: ``(B, S, D)``.
            context: What the blocks share; its rotation is of width ``qk_rope_head_dim``.

        Returns:
            ``(B, S, D)``.
        """
        rotation = context.rotation
        if rotation is None:
            raise ValueError("latent attention needs rotary positions, got none")
        q_nope, q_rope = self._heads(self.q(x_BSD)).split(self.q_split, dim=-1)
        latent, k_rope = self.kv_down(x_BSD).split(self.latent_split, dim=-1)
        # Both go as one head, which is the shape that caches expect.
        latent = self.kv_norm(latent)[:, None]
        k_rope = rotate_pairs(k_rope[:, None], rotation)
        if context.cache is not None:
            latent, k_rope = context.cache.update(latent, k_rope, self.index)
        k_nope, v = self._heads(self.kv_up(latent[:, 0])).split(self.kv_split, dim=-1)
        q = torch.cat([q_nope, rotate_pairs(q_rope, rotation)], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.num_heads, -1, -1)], dim=-1)
        return self.out(attend(q, k, v, context.attention_mask))

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
