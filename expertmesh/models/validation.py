"""Checks of a decoder's configuration, each with the message that mends it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from expertmesh.errors import nearest
from expertmesh.kernels.activations import ACTIVATIONS
from expertmesh.models.experts import FORMS, form_of
from expertmesh.routing import Capacity, GroupLimit
from expertmesh.routing.presets import named_capacity

if TYPE_CHECKING:
    from expertmesh.models.config import DecoderConfig

LATENT_FIELDS = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
ROUTER_FIELDS = {
    "dim": "the model's dim",
    "num_experts": "the model's num_experts",
    "k": "experts_per_token",
    "layer": "the block's index",
    "seed": "made of the model's",
    "device": "the model's",
    "dtype": "the model's",
}
PRESET_NUMBERS = ("balance_coef", "z_coef", "bias_rate")
ROUTER_NUMBERS = ("scale", "init_std")
ROUTER_TEXTS = ("score", "renormalize", "sampling")
ROUTER_TABLES: dict[str, type] = {"capacity": Capacity, "group_limit": GroupLimit}
ROUTER_OBJECTS = ("noise", "skip", "bias")
EXPERT_FIELDS = (
    "experts_per_token",
    "expert_hidden",
    "num_shared_experts",
    "first_dense",
    "extra_mlp",
)


def check_config(config: DecoderConfig) -> None:
    """Refuse values that are out of range, and values that would do nothing.

    Raises:
        ValueError: Names the field, what was expected, what came, and what to set.
    """
    for name in ("vocab_size", "dim", "num_layers", "num_heads", "max_seq_len", "moe_every"):
        _at_least(config, name, 1)
    for name in ("first_dense", "num_experts", "num_shared_experts"):
        _at_least(config, name, 0)
    for name in ("norm_eps", "init_std", "rope_theta"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(
                f"{name} must be positive and finite, got {getattr(config, name)}; set {name} = "
                f"{getattr(type(config), name)}"
            )
    for name in ("dropout", "expert_dropout"):
        p = getattr(config, name)
        if not 0 <= p < 1:
            raise ValueError(
                f"{name} must be at least 0 and below 1, got {p}; set {name} = 0 for none"
            )
    _one_of(config, "losses", ("attach", "return"))
    _one_of(config, "activation", ACTIVATIONS)
    _one_of(config, "mlp", ("gated", "doubly_gated"))
    _one_of(config, "position", ("rotary", "learned", "none"))
    _one_of(config, "attention", ("gqa", "mla"))
    if config.position != "rotary" and config.rope_theta != type(config).rope_theta:
        raise ValueError(
            f"rope_theta has no meaning for position={config.position!r}, got {config.rope_theta}; "
            "set position='rotary', or leave rope_theta out"
        )
    if config.attention == "gqa":
        _check_grouped(config)
    else:
        _check_latent(config)
    _one_of(config, "expert_form", ("auto", *FORMS))
    _check_experts(config)
    _check_dense(config)


def _check_grouped(config: DecoderConfig) -> None:
    _one_of(config, "qk_norm", ("none", "head", "full"))
    scale = config.attention_scale
    if scale is not None:
        _number("attention_scale", scale)
        if scale <= 0:
            raise ValueError(
                f"attention_scale must be positive, got {scale}; leave it out for "
                f"head_width ** -0.5 = {config.head_width**-0.5:.4g}"
            )
    for name in LATENT_FIELDS:
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} has no meaning for attention='gqa', got {getattr(config, name)}; "
                f"set attention='mla' or leave {name} out"
            )
    if config.head_dim is None and config.dim % config.num_heads:
        raise ValueError(
            f"num_heads must divide dim={config.dim}, got {config.num_heads}; "
            "set head_dim, or num_heads to a divisor"
        )
    if config.head_dim is not None:
        _at_least(config, "head_dim", 1)
    if config.num_kv_heads is not None:
        _at_least(config, "num_kv_heads", 1)
        if config.num_heads % config.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads={config.num_heads}, "
                f"got {config.num_kv_heads}; set a divisor"
            )
    if config.position == "rotary" and config.head_width % 2:
        raise ValueError(
            f"head_dim must be even for rotary positions, got {config.head_width}; "
            f"set head_dim={config.head_width + 1} or position='learned'"
        )


def _check_latent(config: DecoderConfig) -> None:
    for name in ("num_kv_heads", "head_dim"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} has no meaning for attention='mla', got {getattr(config, name)}; "
                "set qk_nope_head_dim, qk_rope_head_dim and v_head_dim instead"
            )
    if config.attention_scale is not None:
        raise ValueError(
            "attention_scale has no meaning for attention='mla', "
            f"got {config.attention_scale}; leave it out"
        )
    if config.qk_norm != "none":
        raise ValueError(
            f"qk_norm must be 'none' for attention='mla', which norms its latents, "
            f"got {config.qk_norm!r}"
        )
    for name in LATENT_FIELDS:
        if name != "q_lora_rank" or config.q_lora_rank is not None:
            _at_least(config, name, 1)
    if config.qk_rope_head_dim is not None and config.qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim must be even, got {config.qk_rope_head_dim}; "
            f"set {config.qk_rope_head_dim + 1}"
        )
    if config.position != "rotary":
        raise ValueError(
            f"position must be 'rotary' for attention='mla', got {config.position!r}; "
            "set it, or attention='gqa'"
        )


def _check_experts(config: DecoderConfig) -> None:
    if config.num_experts == 0:
        for name in EXPERT_FIELDS:
            if getattr(config, name):
                raise ValueError(
                    f"{name} has no meaning without experts, got {getattr(config, name)}; "
                    f"set num_experts, or {name}=0"
                )
        if config.expert_form != "auto" or config.expert_dropout:
            raise ValueError(
                f"expert_form={config.expert_form!r} and expert_dropout={config.expert_dropout} "
                "have no meaning without experts; set num_experts, or leave them out"
            )
        if config.router != type(config).router:
            raise ValueError(
                f"router has no meaning without experts, got {config.router!r}; set num_experts, "
                "or leave router out"
            )
        if config.moe_every != 1 or config.router_options:
            raise ValueError(
                f"moe_every={config.moe_every} and router_options={config.router_options} have no "
                "meaning without experts; set num_experts, or leave them out"
            )
        return
    _at_least(config, "expert_hidden", 1)
    if form_of(config) == "gpt_oss" and config.mlp != "gated":
        raise ValueError(
            f"mlp must be 'gated' for gpt-oss's experts, got {config.mlp!r}; set it, or "
            "expert_form='plain'"
        )
    _check_router_options(config)
    if not 1 <= config.experts_per_token <= config.num_experts:
        raise ValueError(
            f"experts_per_token must be between 1 and num_experts={config.num_experts}, "
            f"got {config.experts_per_token}; set experts_per_token <= {config.num_experts}"
        )
    if config.num_moe_layers == 0:
        raise ValueError(
            f"no block is MoE with num_layers={config.num_layers}, moe_every={config.moe_every}, "
            f"first_dense={config.first_dense}; lower the last two, or set num_experts=0"
        )
    if 0 < config.first_dense < config.moe_every:
        raise ValueError(
            f"first_dense={config.first_dense} changes nothing with moe_every={config.moe_every}: "
            f"the first {config.moe_every - 1} blocks are dense anyway; set first_dense = 0"
        )


def _check_router_options(config: DecoderConfig) -> None:
    for option, value in config.router_options.items():
        if option in ROUTER_FIELDS:
            raise ValueError(
                f"router_options.{option} is not an option: the router's {option} is "
                f"{ROUTER_FIELDS[option]}; set that"
            )
        if not _is_plain(value):
            raise ValueError(
                f"router_options.{option} must be a number, text, table or None, which a run file "
                f"can hold, got {type(value).__name__}; build an MoE layer for more"
            )
        if option == "capacity" and isinstance(value, str):
            named_capacity(config.router, value)
        else:
            _check_router_option(f"router_options.{option}", option, value)


def _check_router_option(name: str, option: str, value: object) -> None:
    """Types: the router takes what it is given, and would fail at its first forward pass."""
    if option in PRESET_NUMBERS:
        if value is not None:
            _number(name, value, least=0.0)
    elif option in ROUTER_NUMBERS:
        _number(name, value)
    elif option in ROUTER_TEXTS:
        _text(name, value)
    elif option in ROUTER_TABLES:
        if value is not None:
            _check_table(name, value, ROUTER_TABLES[option])
    elif option in ROUTER_OBJECTS and value is not None:
        raise ValueError(
            f"{name} can only be None, which takes the preset's away, or left out, got {value!r}; "
            "build an MoE layer for more"
        )
    elif option == "losses":
        raise ValueError(f"{name} is not an option here; set balance_coef and z_coef instead")


def _check_table(name: str, value: object, kind: type) -> None:
    """A table whose entries are fields of a dataclass, of their types."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table of {', '.join(fields)}, got {value!r}")
    for key, item in value.items():
        if key not in fields:
            hint = nearest(str(key), fields)
            raise ValueError(f"{name}.{key} is unknown{hint} (its entries are {', '.join(fields)})")
        if fields[key] in (float, float | None):
            if item is not None or fields[key] is float:
                _number(f"{name}.{key}", item)
        elif fields[key] is int:
            _integer(f"{name}.{key}", item)
        elif key != "scope":
            _text(f"{name}.{key}", item)
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in value:
            raise ValueError(f"{name} has no {field.name}, which has no default; set it too")


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _check_dense(config: DecoderConfig) -> None:
    if not isinstance(config.extra_mlp, bool):
        raise ValueError(f"extra_mlp must be true or false, got {config.extra_mlp!r}; set one")
    if config.num_moe_layers < config.num_layers or config.extra_mlp:
        _at_least(config, "dense_hidden", 1)
    elif config.dense_hidden is not None:
        raise ValueError(
            f"dense_hidden has no meaning when every block is MoE, got {config.dense_hidden}; "
            "leave it out, or set moe_every, first_dense or extra_mlp"
        )


def _number(name: str, value: object, least: float = -math.inf) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not least <= value < math.inf:  # type: ignore[operator]  # numeric, see above
        bound = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}; set one")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}; set one")


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}; set one")


def _at_least(config: DecoderConfig, name: str, least: int) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}; set it")


def _one_of(config: DecoderConfig, name: str, options: Iterable[str]) -> None:
    value, options = getattr(config, name), list(options)
    if value not in options:
        hint = nearest(str(value), options)
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {value!r}{hint}")
