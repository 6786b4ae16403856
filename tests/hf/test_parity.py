"""The same weights give the same logits as the models of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from expertmesh.models import DecoderConfig, DecoderLM

SIZES: dict[str, Any] = {
    "vocab_size": 43,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
SHAPE: dict[str, Any] = {
    "vocab_size": 43,
    "dim": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 64,
    "norm_eps": 1e-5,
    "experts_per_token": 2,
}


def mixtral() -> tuple[nn.Module, DecoderConfig]:
    theirs = MixtralConfig(
        **SIZES, intermediate_size=24, num_local_experts=4, rope_parameters=rope(1e6)
    )
    ours = DecoderConfig(**SHAPE, rope_theta=1e6, num_experts=4, expert_hidden=24, router="mixtral")
    return MixtralForCausalLM(theirs), ours


def olmoe() -> tuple[nn.Module, DecoderConfig]:
    theirs = OlmoeConfig(**SIZES, intermediate_size=24, num_experts=4, rope_parameters=rope(1e4))
    ours = DecoderConfig(**SHAPE, num_experts=4, expert_hidden=24, qk_norm="full", router="olmoe")
    return OlmoeForCausalLM(theirs), ours


def qwen3_moe() -> tuple[nn.Module, DecoderConfig]:
    theirs = Qwen3MoeConfig(
        **SIZES,
        head_dim=12,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_experts=8,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        rope_parameters=rope(1e6),
    )
    ours = DecoderConfig(
        **SHAPE,
        head_dim=12,
        dense_hidden=40,
        moe_every=2,
        num_experts=8,
        expert_hidden=24,
        qk_norm="head",
        rope_theta=1e6,
        router="qwen3_moe",
    )
    return Qwen3MoeForCausalLM(theirs), ours


def deepseek_v2(q_lora_rank: int | None) -> tuple[nn.Module, DecoderConfig]:
    # Its norms of the latents ignore the configuration and use 1e-6.
    sizes = {**SIZES, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    theirs = DeepseekV2Config(
        **sizes,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=12,
        routed_scaling_factor=2.0,
        topk_method="greedy",
        rope_parameters=rope(1e4),
    )
    shape = {**SHAPE, "num_kv_heads": None, "norm_eps": 1e-6}
    ours = DecoderConfig(
        **shape,
        attention="mla",
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=12,
        dense_hidden=40,
        first_dense=1,
        num_experts=8,
        expert_hidden=24,
        num_shared_experts=2,
        router="deepseek_v2",
        router_options={"scale": 2.0},
    )
    return DeepseekV2ForCausalLM(theirs), ours


def rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


RENAMED = (
    ("model.embed_tokens.", "embedding."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
    ("model.layers.", "blocks."),
    (".input_layernorm.", ".attention_norm."),
    (".self_attn.q_a_proj.", ".attention.q.0."),
    (".self_attn.q_a_layernorm.", ".attention.q.1."),
    (".self_attn.q_b_proj.", ".attention.q.2."),
    (".self_attn.kv_a_proj_with_mqa.", ".attention.kv_down."),
    (".self_attn.kv_a_layernorm.", ".attention.kv_norm."),
    (".self_attn.kv_b_proj.", ".attention.kv_up."),
    (".self_attn.o_proj.", ".attention.out."),
    (".self_attn.q_proj.", ".attention.q."),
    (".self_attn.k_proj.", ".attention.k."),
    (".self_attn.v_proj.", ".attention.v."),
    (".self_attn.", ".attention."),
    (".mlp.gate.weight", ".moe.router.weight_ED"),
    (".mlp.experts.gate_up_proj", ".moe.experts.gate_up"),
    (".mlp.experts.down_proj", ".moe.experts.down"),
    (".mlp.shared_experts.", ".moe.shared."),
    ("gate_proj.", "gate."),
    ("up_proj.", "up."),
    ("down_proj.", "down."),
)


def translated(state: dict[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """Their parameters under our names; gate and up are rows of one matrix there."""
    ours = {}
    for name, value in state.items():
        for theirs, our in RENAMED:
            name = name.replace(theirs, our)
        if name.endswith("experts.gate_up"):
            value = value.unflatten(1, (2, -1))
        block = int(name.split(".")[1]) if name.startswith("blocks.") else -1
        kind = "moe" if config.is_moe(block) else "mlp"
        ours[name.replace("post_attention_layernorm", f"{kind}_norm")] = value
    return ours


@pytest.mark.parametrize(
    "build",
    [mixtral, olmoe, qwen3_moe, lambda: deepseek_v2(None), lambda: deepseek_v2(14)],
    ids=["mixtral", "olmoe", "qwen3-moe", "deepseek-v2-direct", "deepseek-v2-latent"],
)
def test_logits_are_theirs(build: Callable[[], tuple[nn.Module, DecoderConfig]]) -> None:
    torch.manual_seed(0)
    theirs, config = build()
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            # Norms of 1 and a router of 0 would hide a swap.
            param.copy_(torch.rand_like(param) + 0.5 if "norm" in name else 0.3 * param.normal_())
    ours = DecoderLM(config).eval()
    ours.load_state_dict(translated(theirs.state_dict(), config))
    tokens = torch.randint(43, (2, 11))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs.eval()(tokens, attention_mask=mask, position_ids=positions).logits
        actual = ours(tokens, padding_mask=mask == 0)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(actual[1, 4:], expected[1, 4:], rtol=1e-5, atol=2e-5)
    assert expected.std() > 0.1
