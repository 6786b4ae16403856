"""Presets: published totals, and what the demo relies on."""

import pytest
import torch

from expertmesh.models import DecoderLM, decoder_preset, decoder_presets

BILLION = 1e9


@pytest.mark.parametrize("name", decoder_presets())
def test_counts_are_those_of_the_model(name: str) -> None:
    config = decoder_preset(name)
    with torch.device("meta"):
        model = DecoderLM(config)
    assert config.num_params == sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("olmoe-1b-7b", 6.92, 1.28),
        ("mixtral-8x7b", 46.7, 12.9),
        ("qwen3-30b-a3b", 30.5, 3.35),
        ("deepseek-v2-lite", 15.7, 2.66),
    ],
)
def test_published_totals(name: str, total: float, active: float) -> None:
    config = decoder_preset(name)
    assert config.num_params / BILLION == pytest.approx(total, rel=2e-3)
    assert config.num_active_params / BILLION == pytest.approx(active, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "parameters", "active_in_blocks"),
    [
        ("openmoe-base", 799_663_104, 0.142),
        ("openmoe-8b", 11_855_046_656, 2.75),
        ("openmoe-34b", 46_270_737_408, 8.46),
    ],
)
def test_openmoe_has_the_published_tensors(
    name: str, parameters: int, active_in_blocks: float
) -> None:
    config = decoder_preset(name)
    assert config.num_params == parameters
    blocks = config.num_active_params - 2 * config.vocab_size * config.dim
    assert blocks / BILLION == pytest.approx(active_in_blocks, rel=5e-3)


def test_openmoe_averages_its_losses_over_layers() -> None:
    for name in decoder_presets():
        config = decoder_preset(name)
        if config.router == "openmoe":
            coefs = {loss.name: loss.coef for loss in config.build_router().losses}
            z_coef = 1e-3 if name == "openmoe-34b" else 1e-4
            total = {key: coef * config.num_moe_layers for key, coef in coefs.items()}
            assert total == pytest.approx({"balance": 0.01, "z": z_coef})


def test_deepseeks_own_count_leaves_the_embedding_out() -> None:
    config = decoder_preset("deepseek-v2-lite")
    active = config.num_active_params - config.vocab_size * config.dim
    assert active / BILLION == pytest.approx(2.4, rel=0.025)


def test_nano_dense_costs_what_nano_costs() -> None:
    nano, dense = decoder_preset("nano"), decoder_preset("nano-dense")
    router = 2 * nano.num_moe_layers * nano.num_experts * nano.dim
    assert nano.flops_per_token(256) - dense.flops_per_token(256) == router
    assert router < 0.01 * dense.flops_per_token(256)
    assert nano.num_experts % 4 == 0
    assert 2e6 < nano.num_params < 4e6


def test_overrides() -> None:
    assert decoder_preset("nano", dim=64, num_experts=16).num_experts == 16
    with pytest.raises(ValueError, match=r"unknown field 'num_expert'.*'num_experts'"):
        decoder_preset("nano", num_expert=4)
    with pytest.raises(ValueError, match=r"preset must be one of nano, .*did you mean 'nano'"):
        decoder_preset("nanno")
