"""Configurations: what is refused, and what the arithmetic says."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.routing import Capacity
from tests.models.conftest import GROUPED, LATENT, SHAPES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts_per_token": 5},
            "between 1 and num_experts=4, got 5; set experts_per",
        ),
        ({"experts_per_token": 0}, "between 1 and num_experts=4, got 0"),
        ({"num_heads": 3}, "num_heads must divide dim=16, got 3"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
        ({"head_dim": 5}, "head_dim must be even for rotary positions, got 5"),
        ({"router": "mixtrall"}, "did you mean 'mixtral'"),
        ({"router_options": {"renormalise": "no"}}, "did you mean 'renormalize'"),
        ({"router_options": {"k": 1}}, "the router's k is experts_per_token; set that"),
        ({"router_options": {"noise": b"x"}}, "router_options.noise must be a number"),
        ({"router_options": {"noise": "jitter"}}, "noise can only be None.*or left out"),
        ({"router_options": {"losses": 1}}, "set balance_coef and z_coef instead"),
        ({"router_options": {"balance_coef": "x"}}, "balance_coef must be a finite number"),
        (
            {"router_options": {"z_coef": -1}},
            "z_coef must be .* of at least 0, got -1",
        ),
        ({"router_options": {"scale": math.nan}}, "scale must be a finite number, got nan"),
        ({"router_options": {"capacity": 1.5}}, "capacity must be a table of factor, .*, got 1.5"),
        ({"router_options": {"capacity": {"factor": "2"}}}, "capacity.factor must be a finite"),
        (
            {"router_options": {"capacity": {"factor": 0}}},
            "capacity factor must be a finite number above 0, got 0",
        ),
        ({"router_options": {"capacity": {"fctor": 1}}}, "capacity.fctor is unknown.*'factor'"),
        ({"router_options": {"capacity": {"order": "token"}}}, "capacity has no factor"),
        ({"router_options": {"score": 3}}, "router_options.score must be a text, got 3"),
        (
            {"router_options": {"capacity": {"factor": 1, "order": 3}}},
            "capacity.order must be a text",
        ),
        ({"router_options": {"group_limit": {"kept": 1.5}}}, "group_limit.kept must be an integer"),
        ({"activation": "sillu"}, "did you mean 'silu'"),
        ({"position": "rotation"}, "position must be one of rotary, learned, none"),
        ({"attention": "mha"}, "attention must be one of gqa, mla, got 'mha'"),
        ({"losses": "drop"}, "losses must be one of attach, return"),
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"num_layers": 2.0}, "num_layers must be an integer of at least 1, got 2.0"),
        ({"expert_hidden": 0}, "expert_hidden must be an integer of at least 1"),
        ({"dense_hidden": None}, "dense_hidden must be an integer of at least 1, got None"),
        ({"moe_every": 1}, "dense_hidden has no meaning when every block is MoE"),
        ({"position": "none", "rope_theta": 5e5}, "rope_theta has no meaning for position='none'"),
        ({"moe_every": 4}, "no block is MoE"),
        ({"first_dense": 3}, "no block is MoE"),
        ({"num_experts": 0}, "experts_per_token has no meaning without experts, got 2"),
        ({"first_dense": 1}, "first_dense=1 changes nothing with moe_every=2: the first 1 blocks"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"norm_eps": math.inf}, "norm_eps must be positive and finite, got inf; set norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta must be positive and finite, got inf"),
        ({"init_std": math.inf}, "init_std must be positive and finite, got inf"),
        ({"kv_lora_rank": 8}, "kv_lora_rank has no meaning for attention='gqa'"),
        ({"attention_scale": 0.0}, "attention_scale must be positive, got 0.0; leave it out for"),
        ({"attention_scale": "1"}, "attention_scale must be a finite number, got '1'"),
        ({"mlp": "doubly"}, "mlp must be one of gated, doubly_gated.*'doubly_gated'"),
        ({"extra_mlp": 1}, "extra_mlp must be true or false, got 1"),
        ({"moe_every": 1, "extra_mlp": True, "dense_hidden": None}, "dense_hidden must be an int"),
        (
            {"num_experts": 0, "experts_per_token": 0, "expert_hidden": 0, "extra_mlp": True},
            "extra_mlp has no meaning without experts",
        ),
        (
            {
                "num_experts": 0,
                "experts_per_token": 0,
                "expert_hidden": 0,
                "moe_every": 1,
                "router": "switch",
            },
            "router has no meaning without experts, got 'switch'",
        ),
        ({"router_options": {"capacity": "jax"}}, "capacity of router 'mixtral' must be a table"),
        ({"router": "openmoe", "router_options": {"capacity": "jx"}}, "did you mean 'jax'"),
    ],
    ids=str,
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**GROUPED, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads has no meaning for attention='mla'"),
        ({"qk_norm": "head"}, "qk_norm must be 'none'"),
        ({"v_head_dim": None}, "v_head_dim must be an integer of at least 1, got None"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim must be even, got 3; set 4"),
        ({"position": "learned"}, "position must be 'rotary' for attention='mla'"),
        ({"attention_scale": 1.0}, "attention_scale has no meaning for attention='mla'"),
    ],
    ids=str,
)
def test_bad_latent_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**LATENT, **changes})


def test_a_table_may_say_what_is_its_default() -> None:
    table = dataclasses.asdict(Capacity(factor=1.5))
    assert table["eval_factor"] is None
    config = DecoderConfig(**{**GROUPED, "router_options": {"capacity": table}})
    assert config.build_router().capacity == Capacity(factor=1.5)


def test_counts_are_those_of_the_model(config: DecoderConfig) -> None:
    with torch.device("meta"):
        model = DecoderLM(config)
    params = dict(model.named_parameters())
    assert config.num_params == sum(param.numel() for param in params.values())
    experts = sum(param.numel() for name, param in params.items() if ".experts." in name)
    idle = config.num_experts - config.experts_per_token
    unused = experts * idle // config.num_experts if config.num_experts else 0
    assert config.num_active_params == config.num_params - unused


@pytest.mark.parametrize("shape", ["dense", "learned"])
def test_flops_are_those_that_torch_counts(shape: str) -> None:
    """Without experts, whose operation torch's counter does not know."""
    dense = {"moe_every": 1, "num_experts": 0, "experts_per_token": 0, "expert_hidden": 0}
    config = DecoderConfig(**{**SHAPES[shape], **dense})
    with torch.device("meta"):
        model = DecoderLM(config)
        tokens = torch.zeros(1, 10, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    per_key = config.num_layers * 2 * config.num_heads * 2 * config.head_width
    masked = per_key * (10 - 11 / 2)  # torch counts all scores, causal or not
    assert counter.get_total_flops() / 10 == config.flops_per_token(10) + masked


def test_flops_of_experts() -> None:
    """One more choice costs one more expert in each MoE block; so does one more shared expert."""
    base = DecoderConfig(**GROUPED)
    more = DecoderConfig(**{**GROUPED, "experts_per_token": 3})
    shared = DecoderConfig(**{**GROUPED, "num_shared_experts": 1})
    expert = 2 * 3 * 16 * 12
    assert more.flops_per_token(8) - base.flops_per_token(8) == expert
    assert shared.flops_per_token(8) - base.flops_per_token(8) == expert
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        base.flops_per_token(0)


def test_pattern_of_blocks() -> None:
    config = DecoderConfig(**{**GROUPED, "num_layers": 6, "first_dense": 3})
    assert [config.is_moe(index) for index in range(6)] == [False] * 3 + [True, False, True]
    model = DecoderLM(config)
    assert [hasattr(block, "moe") for block in model.blocks] == [False] * 3 + [True, False, True]
    assert config.num_moe_layers == 2
