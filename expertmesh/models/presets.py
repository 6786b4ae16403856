"""Named shapes: the demo's, and those of published models."""

import dataclasses
from collections.abc import Callable
from typing import Any

from expertmesh.errors import nearest
from expertmesh.models.config import DecoderConfig


def decoder_preset(name: str, **overrides: Any) -> DecoderConfig:
    """A published or demonstration shape.

    Args:
        name: One of ``decoder_presets()``.
        overrides: Fields of ``DecoderConfig`` to set otherwise.

    Raises:
        ValueError: If the name or a field is unknown, or a value is refused.
    """
    if name not in _PRESETS:
        options = ", ".join(_PRESETS)
        raise ValueError(f"preset must be one of {options}, got {name!r}{nearest(name, _PRESETS)}")
    fields = [field.name for field in dataclasses.fields(DecoderConfig)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"unknown field {field!r} of DecoderConfig{nearest(field, fields)}")
    return DecoderConfig(**(_PRESETS[name]() | overrides))


def decoder_presets() -> tuple[str, ...]:
    """The names that ``decoder_preset`` knows."""
    return tuple(_PRESETS)


def _nano() -> dict[str, Any]:
    """The demo's model: bytes and two marks, made for minutes on two CPU cores."""
    return _nano_dense() | {
        "moe_every": 2,
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_hidden": 256,
        "router": "mixtral",
        # Mixtral's own 0.001 leaves some experts with several times the load of others so early.
        "router_options": {"balance_coef": 0.01},
    }


def _nano_dense() -> dict[str, Any]:
    """As ``nano``, with a dense MLP as wide as the two experts that a token takes."""
    return {
        "vocab_size": 258,
        "dim": 128,
        "num_layers": 4,
        "num_heads": 4,
        "max_seq_len": 256,
        "dense_hidden": 512,
        # dim ** -0.5: so narrow a model learns far slower from the usual 0.02.
        "init_std": 0.088,
    }


def _olmoe_1b_7b() -> dict[str, Any]:
    """OLMoE-1B-7B (arXiv 2409.02060)."""
    return {
        "vocab_size": 50304,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 16,
        "qk_norm": "full",
        "max_seq_len": 4096,
        "norm_eps": 1e-5,
        "num_experts": 64,
        "experts_per_token": 8,
        "expert_hidden": 1024,
        "router": "olmoe",
    }


def _mixtral_8x7b() -> dict[str, Any]:
    """Mixtral 8x7B (arXiv 2401.04088)."""
    return {
        "vocab_size": 32000,
        "dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "rope_theta": 1e6,
        "max_seq_len": 32768,
        "norm_eps": 1e-5,
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_hidden": 14336,
        "router": "mixtral",
    }


def _qwen3_30b_a3b() -> dict[str, Any]:
    """Qwen3-30B-A3B (arXiv 2505.09388)."""
    return {
        "vocab_size": 151936,
        "dim": 2048,
        "num_layers": 48,
        "num_heads": 32,
        "num_kv_heads": 4,
        "head_dim": 128,
        "qk_norm": "head",
        "rope_theta": 1e6,
        "max_seq_len": 40960,
        "num_experts": 128,
        "experts_per_token": 8,
        "expert_hidden": 768,
        "router": "qwen3_moe",
    }


def _deepseek_v2_lite() -> dict[str, Any]:
    """DeepSeek-V2-Lite (arXiv 2405.04434, appendix B), without its stretching of positions."""
    return {
        "vocab_size": 102400,
        "dim": 2048,
        "num_layers": 27,
        "num_heads": 16,
        "attention": "mla",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_seq_len": 4096,
        "dense_hidden": 10944,
        "first_dense": 1,
        "num_experts": 64,
        "experts_per_token": 6,
        "expert_hidden": 1408,
        "num_shared_experts": 2,
        "router": "deepseek_v2",
        "init_std": 0.006,
    }


def _openmoe(
    *, num_moe_layers: int, z_coef: float = 1e-4, init_std: float | None = None, **sizes: int
) -> dict[str, Any]:
    """OpenMoE (arXiv 2402.01739), as its training code and published tensors have it.

    The balance losses are averaged over MoE layers there and added up here, so their coefficients
    are divided by the number of these layers. Initial weights have the variance 0.1 / D, as those
    that read the model's width do there.
    """
    return {
        "vocab_size": 256384,
        "attention_scale": 1.0,
        "max_seq_len": 2048,
        "mlp": "doubly_gated",
        "expert_hidden": sizes["dense_hidden"],
        "extra_mlp": True,
        "experts_per_token": 2,
        "router": "openmoe",
        "router_options": {
            "balance_coef": 0.01 / num_moe_layers,
            "z_coef": z_coef / num_moe_layers,
        },
        "init_std": (0.1 / sizes["dim"]) ** 0.5 if init_std is None else init_std,
        **sizes,
    }


def _openmoe_test() -> dict[str, Any]:
    """OpenMoE's structure in small: every second block MoE, heads wider than the model."""
    return _openmoe(
        num_moe_layers=2,
        init_std=0.08,  # so narrow a model learns far slower from the family's own
        dim=64,
        num_layers=4,
        num_heads=4,
        head_dim=24,
        dense_hidden=128,
        moe_every=2,
        num_experts=8,
    )


def _openmoe_base() -> dict[str, Any]:
    """OpenMoE base, 16 experts."""
    return _openmoe(
        num_moe_layers=3,
        dim=768,
        num_layers=12,
        num_heads=12,
        head_dim=64,
        dense_hidden=2048,
        moe_every=4,
        num_experts=16,
    )


def _openmoe_8b() -> dict[str, Any]:
    """OpenMoE 8B, 32 experts; 11.9 billion parameters by the published shapes."""
    return _openmoe(
        num_moe_layers=4,
        dim=2048,
        num_layers=24,
        num_heads=24,
        head_dim=128,
        dense_hidden=8192,
        moe_every=6,
        num_experts=32,
    )


def _openmoe_34b() -> dict[str, Any]:
    """OpenMoE 34B, 32 experts; 46.3 billion parameters by the published shapes."""
    return _openmoe(
        num_moe_layers=8,
        z_coef=1e-3,
        dim=3072,
        num_layers=32,
        num_heads=24,
        head_dim=128,
        dense_hidden=12288,
        moe_every=4,
        num_experts=32,
    )


_PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    "nano": _nano,
    "nano-dense": _nano_dense,
    "olmoe-1b-7b": _olmoe_1b_7b,
    "mixtral-8x7b": _mixtral_8x7b,
    "qwen3-30b-a3b": _qwen3_30b_a3b,
    "deepseek-v2-lite": _deepseek_v2_lite,
    "openmoe-test": _openmoe_test,
    "openmoe-base": _openmoe_base,
    "openmoe-8b": _openmoe_8b,
    "openmoe-34b": _openmoe_34b,
}
