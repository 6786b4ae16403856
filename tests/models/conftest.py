"""Tiny shapes that the model tests share."""

from typing import Any

import pytest
import torch

from expertmesh.models import DecoderConfig, DecoderLM

GROUPED: dict[str, Any] = {
    "vocab_size": 31,
    "dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 32,
    "dense_hidden": 24,
    "moe_every": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 12,
    "init_std": 0.3,
}
LATENT: dict[str, Any] = {
    **GROUPED,
    "num_kv_heads": None,
    "attention": "mla",
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_shared_experts": 1,
    "router": "deepseek_v2",
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": GROUPED,
    "head-norm": {**GROUPED, "qk_norm": "head", "head_dim": 6},
    "full-norm": {**GROUPED, "qk_norm": "full", "router": "olmoe"},
    "learned": {**GROUPED, "position": "learned", "tied_embeddings": True},
    "no-position": {**GROUPED, "position": "none"},
    "latent": LATENT,
    "latent-direct": {**LATENT, "q_lora_rank": None},
    "dense": {
        **GROUPED,
        "moe_every": 1,
        "num_experts": 0,
        "experts_per_token": 0,
        "expert_hidden": 0,
    },
    "first-dense": {**GROUPED, "moe_every": 1, "first_dense": 1, "num_shared_experts": 2},
    "openmoe": {
        **GROUPED,
        "num_kv_heads": None,
        "head_dim": 6,
        "attention_scale": 1.0,
        "mlp": "doubly_gated",
        "extra_mlp": True,
        "router": "openmoe",
    },
    "selection-bias": {**GROUPED, "router": "deepseek_v3", "router_options": {"group_limit": None}},
}


@pytest.fixture(params=SHAPES, ids=str)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    """Each tiny shape in turn."""
    return DecoderConfig(**SHAPES[request.param])


@pytest.fixture
def model(config: DecoderConfig) -> DecoderLM:
    """A float64 model in evaluation."""
    return DecoderLM(config, seed=1).double().eval()


@pytest.fixture
def tokens() -> torch.Tensor:
    """``(2, 7)`` ids below every tiny shape's vocabulary."""
    return torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
