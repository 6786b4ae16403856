"""``config.json`` and our configuration."""

import dataclasses
from typing import Any

import pytest

from expertmesh.convert.openmoe.config import decoder_config, is_openmoe, published_config
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, decoder_preset
from tests.openmoe.folders import OLDER_KEYS

TEST = decoder_preset("openmoe-test")


def with_options(**options: Any) -> DecoderConfig:
    return dataclasses.replace(TEST, router_options=dict(TEST.router_options) | options)


@pytest.mark.parametrize("size", ["test", "base", "8b", "34b"])
def test_there_and_back(size: str) -> None:
    config = decoder_preset(f"openmoe-{size}")
    assert decoder_config(published_config(config)) == config


def test_the_older_keys_are_the_8b() -> None:
    assert decoder_config(OLDER_KEYS) == decoder_preset("openmoe-8b")


@pytest.mark.parametrize(
    "changed",
    [
        {"num_kv_heads": 2},
        {"rope_theta": 5000.0},
        {"dropout": 0.1},
        {"expert_dropout": 0.4},
        {"max_seq_len": 64},
    ],
)
def test_fields_there_and_back(changed: dict[str, Any]) -> None:
    config = dataclasses.replace(TEST, **changed)
    assert decoder_config(published_config(config)) == config


@pytest.mark.parametrize("mode", ["jax", "jax_34b", "pytorch"])
def test_capacity_modes_there_and_back(mode: str) -> None:
    keys = published_config(with_options(capacity=mode))
    assert keys["router_capacity_mode"] == mode
    assert decoder_config(keys).router_options["capacity"] == mode


def test_a_capacity_of_other_factors_there_and_back() -> None:
    capacity = {"factor": 0.75, "eval_factor": 1.5, "formula": "colossalai"}
    keys = published_config(with_options(capacity=capacity))
    assert keys["router_capacity_mode"] == "pytorch"
    assert keys["router_capacity_factor_train"] == 0.75
    again = decoder_config(keys).router_options["capacity"]
    assert capacity.items() <= again.items()
    assert published_config(with_options(capacity=again)) == keys


def test_published_folders_are_dropless_here() -> None:
    assert "capacity" not in decoder_config(OLDER_KEYS).router_options


def test_loss_factors_are_of_the_mean_over_layers() -> None:
    keys = published_config(decoder_preset("openmoe-34b"))
    assert (keys["router_aux_loss_factor"], keys["router_z_loss_factor"]) == (0.01, 1e-3)
    options = decoder_config(OLDER_KEYS | {"router_aux_loss_factor": 0.02}).router_options
    assert options["balance_coef"] == pytest.approx(0.02 / 4)


def test_options_without_a_published_key_are_kept() -> None:
    config = with_options(init_std=0.01)
    assert published_config(config)["router_options"] == {"init_std": 0.01}
    assert decoder_config(published_config(config)) == config


def test_what_is_recognised() -> None:
    assert is_openmoe(OLDER_KEYS)
    assert is_openmoe({"model_type": "openmoe"})
    assert is_openmoe({"model_type": "llama", "num_experts": 16, "moe_layer_interval": 4})
    assert not is_openmoe({"model_type": "llama", "num_experts": 16})
    assert not is_openmoe({"model_type": "ernie", "num_experts": 16, "moe_layer_interval": 4})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gated": False}, r"mlp_gated = False \(expected True\)"),
        ({"hidden_act": "silu"}, r"hidden_act = 'silu' \(expected 'swiglu'\)"),
        ({"noisy_policy": "Jitter"}, r"router_noisy_policy = 'Jitter'"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings = True"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_type = 'yarn'"),
        ({"head_dim": None, "num_experts": None}, r"has no head_dim, num_experts"),
        ({"router_capacity_mode": "jacks"}, r"got 'jacks'; did you mean 'jax'\?"),
        ({"router_capacity_mode": "jax", "drop_tks": False}, r"router_drop_tks must be True"),
        ({"router_capacity_mode": "jax", "min_capacity": 8}, r"router_min_capacity must be 4"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decoder_config(OLDER_KEYS | changed)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (decoder_preset("nano"), r"cannot say mlp = 'gated' \(expected 'doubly_gated'\)"),
        (dataclasses.replace(TEST, expert_hidden=64), r"expert_hidden = 64 \(expected 128\)"),
        (dataclasses.replace(TEST, attention_scale=None), r"attention_scale = None"),
        (with_options(capacity={"factor": 1.0}), r"cannot say router_options.capacity"),
    ],
)
def test_what_no_key_can_say_is_an_error(config: DecoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        published_config(config)


def test_no_interval_is_an_error_of_the_field() -> None:
    with pytest.raises(ValueError, match=r"moe_every must be an integer of at least 1, got 0"):
        decoder_config(OLDER_KEYS | {"moe_layer_interval": 0})
