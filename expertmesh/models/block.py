"""Pre-norm blocks: attention, then a dense MLP or an MoE layer, each on a residual branch."""

from functools import partial

from torch import Tensor, nn

from expertmesh.layer import MoE, set_loss_scale
from expertmesh.models.attention import GroupedAttention
from expertmesh.models.config import DecoderConfig
from expertmesh.models.context import BlockContext
from expertmesh.models.dropout import Dropout
from expertmesh.models.experts import build_experts
from expertmesh.models.latent_attention import LatentAttention
from expertmesh.models.mlp import DoublyGatedMLP, GatedMLP
from expertmesh.models.norm import RMSNorm
from expertmesh.recompute import is_recompute


class DenseBlock(nn.Module):
    """Attention and a dense MLP.

    Args:
        config: The model's shape.
        index: The block's place, from 0.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, index)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = build_mlp(config, _given(config.dense_hidden))
        self.attention_dropout = Dropout(config.dropout, index, "attention")
        self.mlp_dropout = Dropout(config.dropout, index, "mlp")

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Args: ``x_BSD`` ``(B, S, D)`` and what the blocks share. Returns ``(B, S, D)``."""
        y_BSD = self.attention(self.attention_norm(x_BSD), context)
        x_BSD = x_BSD + self.attention_dropout(y_BSD, context.key)
        y_BSD = self.mlp(self.mlp_norm(x_BSD))
        return x_BSD + self.mlp_dropout(y_BSD, context.key)


class MoEBlock(nn.Module):
    """Attention, an MoE layer, and with ``extra_mlp`` a dense MLP after it.

    Args:
        config: The model's shape.
        index: The block's place, from 0.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, index)
        self.moe_norm = RMSNorm(config.dim, config.norm_eps)
        self.moe = build_moe(config, index)
        self.attention_dropout = Dropout(config.dropout, index, "attention")
        self.moe_dropout = Dropout(config.dropout, index, "moe")
        self.extra_norm = self.extra_mlp = None
        if config.extra_mlp:
            self.extra_norm = RMSNorm(config.dim, config.norm_eps)
            self.extra_mlp = build_mlp(config, _given(config.dense_hidden))
        self.extra_dropout = Dropout(config.dropout, index, "extra")

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Args: ``x_BSD`` ``(B, S, D)`` and what the blocks share. Returns ``(B, S, D)``."""
        y_BSD = self.attention(self.attention_norm(x_BSD), context)
        x_BSD = x_BSD + self.attention_dropout(y_BSD, context.key)
        x_BSD = x_BSD + self.moe_dropout(self._experts(x_BSD, context), context.key)
        if self.extra_norm is None or self.extra_mlp is None:
            return x_BSD
        y_BSD = self.extra_mlp(self.extra_norm(x_BSD))
        return x_BSD + self.extra_dropout(y_BSD, context.key)

    def _experts(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """The MoE layer on its norm; its decision goes where the context wants it."""
        moe = partial(
            self.moe,
            padding_mask=context.padding_mask_BS,
            token_ids=context.tokens_BS,
            key=context.key,
            routing=context.replay.get(self.index),
        )
        if context.loss_scale is not None:
            # Here and not before the pass: a pass that is recomputed must find its own again.
            set_loss_scale(self.moe, context.loss_scale)
        if context.record is None:
            return moe(self.moe_norm(x_BSD))
        y_BSD, routing = moe(self.moe_norm(x_BSD), return_routing=True)
        if not is_recompute():
            context.record[self.index] = routing
        return y_BSD


def build_attention(config: DecoderConfig, index: int) -> GroupedAttention | LatentAttention:
    """The attention of block ``index``."""
    if config.attention == "gqa":
        return GroupedAttention(
            config.dim,
            config.num_heads,
            config.kv_heads,
            config.head_width,
            index,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            scale=config.attention_scale,
        )
    return LatentAttention(
        config.dim,
        config.num_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=_given(config.kv_lora_rank),
        qk_nope_head_dim=_given(config.qk_nope_head_dim),
        qk_rope_head_dim=_given(config.qk_rope_head_dim),
        v_head_dim=_given(config.v_head_dim),
        index=index,
        norm_eps=config.norm_eps,
    )


_MLPS: dict[str, type[GatedMLP | DoublyGatedMLP]] = {
    "gated": GatedMLP,
    "doubly_gated": DoublyGatedMLP,
}


def build_mlp(config: DecoderConfig, hidden: int) -> nn.Module:
    """A dense MLP of the model's kind and a width of its own."""
    return _MLPS[config.mlp](config.dim, hidden, config.activation)


def build_moe(config: DecoderConfig, index: int) -> MoE:
    """The MoE layer of block ``index``: router, experts, and shared ones if any."""
    experts = build_experts(config)
    shared = None
    if config.num_shared_experts:
        hidden = config.num_shared_experts * config.expert_hidden
        shared = build_mlp(config, hidden)
    return MoE(config.build_router(index), experts, shared=shared, losses=config.losses)


def _given(value: int | None) -> int:
    """A field that the configuration's checks have seen to."""
    assert value is not None
    return value
