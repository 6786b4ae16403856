"""Pre-norm blocks: attention, then a dense MLP or an MoE layer, each on a residual branch."""

from functools import partial

from torch import Tensor, nn

from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE, set_loss_scale
from expertmesh.models.attention import GroupedAttention
from expertmesh.models.config import DecoderConfig
from expertmesh.models.context import BlockContext
from expertmesh.models.dropout import Dropout
from expertmesh.models.latent_attention import LatentAttention
from expertmesh.models.mlp import GatedMLP
from expertmesh.models.norm import RMSNorm
from expertmesh.recompute import is_recompute


class DenseBlock(nn.Module):
    """Attention and a dense gated MLP.

    Args:
        config: The model's shape.
        index: The block's place, from 0.
    """

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        if config.dense_hidden is None:
            raise ValueError("dense_hidden must be set for a dense block, got None")
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, index)
        self.mlp_norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = GatedMLP(config.dim, config.dense_hidden, config.activation)
        self.attention_dropout = Dropout(config.dropout, index, "attention")
        self.mlp_dropout = Dropout(config.dropout, index, "mlp")

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Args: ``x_BSD`` ``(B, S, D)`` and what the blocks share. Returns ``(B, S, D)``."""
        y_BSD = self.attention(self.attention_norm(x_BSD), context)
        x_BSD = x_BSD + self.attention_dropout(y_BSD, context.key)
        y_BSD = self.mlp(self.mlp_norm(x_BSD))
        return x_BSD + self.mlp_dropout(y_BSD, context.key)


class MoEBlock(nn.Module):
    """Attention and an MoE layer.

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

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        """Args: ``x_BSD`` ``(B, S, D)`` and what the blocks share. Returns ``(B, S, D)``."""
        y_BSD = self.attention(self.attention_norm(x_BSD), context)
        x_BSD = x_BSD + self.attention_dropout(y_BSD, context.key)
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
            return x_BSD + self.moe_dropout(moe(self.moe_norm(x_BSD)), context.key)
        y_BSD, routing = moe(self.moe_norm(x_BSD), return_routing=True)
        if not is_recompute():
            context.record[self.index] = routing
        return x_BSD + self.moe_dropout(y_BSD, context.key)


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


def build_moe(config: DecoderConfig, index: int) -> MoE:
    """The MoE layer of block ``index``: router, gated experts, and shared ones if any."""
    experts = GatedMLPExperts(
        config.dim,
        config.expert_hidden,
        config.num_experts,
        activation=config.activation,
        init_std=config.init_std,
        seed=0,
    )
    shared = None
    if config.num_shared_experts:
        hidden = config.num_shared_experts * config.expert_hidden
        shared = GatedMLP(config.dim, hidden, config.activation)
    return MoE(config.build_router(index), experts, shared=shared, losses=config.losses)


def _given(value: int | None) -> int:
    """A field that the configuration's checks have seen to."""
    assert value is not None
    return value
