"""Parameters and floating point operations of a decoder, by arithmetic on its configuration.

Matrices and vectors are counted apart, because only matrices multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from expertmesh.models.experts import num_biases

if TYPE_CHECKING:
    from expertmesh.models.config import DecoderConfig


def num_params(config: DecoderConfig) -> int:
    """All parameters of the model."""
    vectors = _vectors(config) + _expert_biases(config, config.num_experts)
    return _matrices(config, config.num_experts) + vectors + _lookups(config)


def num_active_params(config: DecoderConfig) -> int:
    """All parameters but those of the E - K experts that a token does not choose."""
    vectors = _vectors(config) + _expert_biases(config, config.experts_per_token)
    return _matrices(config, config.experts_per_token) + vectors + _lookups(config)


def flops_per_token(config: DecoderConfig, seq_len: int) -> int:
    """Forward operations per token; the formula stands at ``DecoderConfig.flops_per_token``."""
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}; set a length")
    key_width, value_width = _head_widths(config)
    per_block = config.num_heads * (key_width + value_width) * (seq_len + 1)
    return 2 * _matrices(config, config.experts_per_token) + config.num_layers * per_block


def block_matrices(config: DecoderConfig, index: int) -> int:
    """Weights of block ``index`` that a token is multiplied with: K of the E experts."""
    return _block_matrices(config, config.is_moe(index), config.experts_per_token)


def _block_matrices(config: DecoderConfig, moe: bool, num_experts: int) -> int:
    """Weights of a block that multiply, with so many experts counted."""
    attention = _attention_matrices(config)
    if not moe:
        return attention + _mlp(config, config.dense_hidden or 0)
    extra = _mlp(config, config.dense_hidden or 0) if config.extra_mlp else 0
    experts = (num_experts + config.num_shared_experts) * _mlp(config, config.expert_hidden)
    return attention + _router(config) + experts + extra


def _matrices(config: DecoderConfig, num_experts: int) -> int:
    """Weights that multiply, with so many experts counted in each MoE block."""
    num_dense = config.num_layers - config.num_moe_layers
    blocks = num_dense * _block_matrices(config, False, 0)
    if config.num_moe_layers:
        blocks += config.num_moe_layers * _block_matrices(config, True, num_experts)
    return blocks + config.vocab_size * config.dim


def _lookups(config: DecoderConfig) -> int:
    """Tables from which a row is taken: the embedding, unless it is the output's weight too."""
    rows = 0 if config.tied_embeddings else config.vocab_size
    rows += config.max_seq_len if config.position == "learned" else 0
    return rows * config.dim


def _vectors(config: DecoderConfig) -> int:
    num_norms = 2 * config.num_layers + 1
    if config.extra_mlp:
        num_norms += config.num_moe_layers
    norms = num_norms * config.dim
    if config.attention == "mla":
        return norms + config.num_layers * ((config.q_lora_rank or 0) + (config.kv_lora_rank or 0))
    heads = {"none": 0, "head": 2, "full": config.num_heads + config.kv_heads}[config.qk_norm]
    return norms + config.num_layers * heads * config.head_width


def _expert_biases(config: DecoderConfig, num_experts: int) -> int:
    return config.num_moe_layers * num_experts * num_biases(config)


def _head_widths(config: DecoderConfig) -> tuple[int, int]:
    """Widths of a head's key and value."""
    if config.attention == "mla":
        key = (config.qk_nope_head_dim or 0) + (config.qk_rope_head_dim or 0)
        return key, config.v_head_dim or 0
    return config.head_width, config.head_width


def _attention_matrices(config: DecoderConfig) -> int:
    dim, heads = config.dim, config.num_heads
    key_width, value_width = _head_widths(config)
    if config.attention == "gqa":
        return dim * key_width * (2 * heads + 2 * config.kv_heads)
    q_rank, kv_rank = config.q_lora_rank, config.kv_lora_rank or 0
    q = dim * heads * key_width
    if q_rank is not None:
        q = dim * q_rank + q_rank * heads * key_width
    kv_down = dim * (kv_rank + (config.qk_rope_head_dim or 0))
    kv_up = kv_rank * heads * ((config.qk_nope_head_dim or 0) + value_width)
    return q + kv_down + kv_up + heads * value_width * dim


def _mlp(config: DecoderConfig, hidden: int) -> int:
    matrices = {"gated": 3, "doubly_gated": 4}[config.mlp]
    return matrices * config.dim * hidden


def _router(config: DecoderConfig) -> int:
    """Asked of the router itself: some learn their noise as well."""
    if config.num_experts == 0:
        return 0
    with torch.device("meta"):
        router = config.build_router()
    return sum(param.numel() for param in router.parameters())
