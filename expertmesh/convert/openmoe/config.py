"""OpenMoE's published ``config.json`` and our ``DecoderConfig``, each from the other.

Three keys are ours. ``router_capacity_mode`` is a name of ``OPENMOE_CAPACITIES``; without it
routing is dropless. ``expert_dropout_rate`` is dropout inside experts. Options of the router that
the published keys cannot say go under ``router_options``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from expertmesh.convert.check import unlike, usual_experts
from expertmesh.convert.family import EXPERT_DROPOUT
from expertmesh.convert.rope import rope_theta
from expertmesh.errors import UserError, nearest
from expertmesh.models import DecoderConfig
from expertmesh.routing import Capacity
from expertmesh.routing.presets import OPENMOE_CAPACITIES

MODEL_TYPE, ARCHITECTURE = "openmoe", "OpenMoeForCausalLM"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 0

# Keys of the configurations in ColossalAI's repository, which its code does not read.
_OLDER = {
    "topk": "router_topk",
    "capacity_factor_train": "router_capacity_factor_train",
    "capacity_factor_eval": "router_capacity_factor_eval",
    "min_capacity": "router_min_capacity",
    "noisy_policy": "router_noisy_policy",
    "drop_tks": "router_drop_tks",
    "gated": "mlp_gated",
    "layer_norm_epsilon": "rms_norm_eps",
}
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "num_experts",
    "moe_layer_interval",
)
# What the model is, where a key says something else: an error, because nothing follows it.
_FIXED: dict[str, Any] = {
    "hidden_act": "swiglu",
    "mlp_gated": True,
    "router_noisy_policy": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
_MODE = "router_capacity_mode"


def is_openmoe(keys: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is OpenMoE's; the published ones say ``"llama"``."""
    if keys.get("model_type") == MODEL_TYPE or ARCHITECTURE in (keys.get("architectures") or ()):
        return True
    return keys.get("model_type") in (None, "llama") and {
        "num_experts",
        "moe_layer_interval",
    } <= set(keys)


def decoder_config(keys: Mapping[str, Any]) -> DecoderConfig:
    """The model's shape from the content of a ``config.json``.

    Args:
        keys: As published, or as in ColossalAI's repository. Those that say how to run, such as
            ``enable_kernel``, are passed over.

    Raises:
        UserError: If keys are missing, or say what the model cannot be.
    """
    keys = {_OLDER.get(key, key): value for key, value in keys.items()}
    if missing := [key for key in _NEEDED if keys.get(key) is None]:
        raise UserError(f"the configuration has no {', '.join(missing)}; expected OpenMoE's keys")
    if wrong := unlike(keys, _FIXED):
        raise UserError(f"OpenMoE has no {wrong}; is this another model's config.json?")
    num_layers, interval = keys["num_hidden_layers"], keys["moe_layer_interval"]
    # The losses are averaged over MoE layers there, and added up here.
    num_moe_layers = max(1, num_layers // max(1, interval))
    options = dict(keys.get("router_options", {})) | {
        "balance_coef": keys.get("router_aux_loss_factor", 0.01) / num_moe_layers,
        "z_coef": keys.get("router_z_loss_factor", 1e-4) / num_moe_layers,
    }
    if (capacity := _capacity(keys)) is not None:
        options["capacity"] = capacity
    dim = keys["hidden_size"]
    return DecoderConfig(
        vocab_size=keys["vocab_size"],
        dim=dim,
        num_layers=num_layers,
        num_heads=keys["num_attention_heads"],
        num_kv_heads=_other(keys.get("num_key_value_heads"), keys["num_attention_heads"]),
        head_dim=keys["head_dim"],
        attention_scale=1.0,
        rope_theta=rope_theta(keys, 10000.0),
        max_seq_len=keys.get("max_position_embeddings", 2048),
        norm_eps=keys.get("rms_norm_eps", 1e-6),
        mlp="doubly_gated",
        dense_hidden=keys["intermediate_size"],
        extra_mlp=True,
        moe_every=interval,
        num_experts=keys["num_experts"],
        experts_per_token=keys.get("router_topk", 2),
        expert_hidden=keys["intermediate_size"],
        router="openmoe",
        router_options=options,
        dropout=keys.get("dropout_rate", 0.0),
        expert_dropout=keys.get(EXPERT_DROPOUT, 0.0),
        init_std=keys.get("initializer_range", (0.1 / dim) ** 0.5),
    )


def published_config(config: DecoderConfig) -> dict[str, Any]:
    """What goes into ``config.json``, with the published keys.

    Raises:
        UserError: If the model is not OpenMoE, or has what no key can say.
    """
    _check_sayable(config)
    options = dict(config.router_options)
    capacity = _capacity_keys(options.pop("capacity", None))
    layers = config.num_moe_layers
    keys: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.dense_hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "swiglu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "dropout_rate": config.dropout,
        "initializer_range": config.init_std,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "num_experts": config.num_experts,
        "moe_layer_interval": config.moe_every,
        "mlp_gated": True,
        "expert_parallel": None,
        "router_topk": config.experts_per_token,
        "router_noisy_policy": None,
        "router_aux_loss_factor": _decimal(options.pop("balance_coef", 1e-2) * layers),
        "router_z_loss_factor": _decimal(options.pop("z_coef", 1e-4) * layers),
    } | capacity
    if config.expert_dropout:
        keys[EXPERT_DROPOUT] = config.expert_dropout
    if options:
        keys["router_options"] = options
    return keys


def _check_sayable(config: DecoderConfig) -> None:
    wanted = {
        "mlp": "doubly_gated",
        "extra_mlp": True,
        "attention": "gqa",
        "attention_scale": 1.0,
        "qk_norm": "none",
        "position": "rotary",
        "activation": "silu",
        "router": "openmoe",
        "num_shared_experts": 0,
        "first_dense": 0,
        "expert_hidden": config.dense_hidden,
        "tied_embeddings": False,
    } | usual_experts(config)
    if wrong := unlike(vars(config), wanted):
        raise UserError(
            f"OpenMoE's config.json cannot say {wrong}; start from one of the presets "
            "openmoe-base, openmoe-8b, openmoe-34b"
        )


def _capacity(keys: Mapping[str, Any]) -> str | dict[str, Any] | None:
    """The router's option; None for dropless."""
    mode = keys.get(_MODE, "dropless")
    if mode == "dropless":
        return None
    if mode not in OPENMOE_CAPACITIES:
        known = ("dropless", *OPENMOE_CAPACITIES)
        raise UserError(
            f"{_MODE} must be one of {', '.join(known)}, got {mode!r}{nearest(mode, known)}"
        )
    for key, value in (("router_drop_tks", True), ("router_min_capacity", 4)):
        if keys.get(key, value) != value:
            raise UserError(
                f"{key} must be {value!r} with {_MODE} = {mode!r}, got {keys[key]!r}; set "
                f"{_MODE} = 'dropless' to drop nothing"
            )
    usual = OPENMOE_CAPACITIES[mode]
    capacity = dataclasses.replace(
        usual,
        factor=keys.get("router_capacity_factor_train", usual.factor),
        eval_factor=keys.get("router_capacity_factor_eval", usual.eval_factor),
    )
    return mode if capacity == usual else dataclasses.asdict(capacity)


def _capacity_keys(capacity: Any) -> dict[str, Any]:
    """The published keys, which are there without effect where nothing is dropped."""
    keys = {
        "router_capacity_factor_train": 1.25,
        "router_capacity_factor_eval": 2.0,
        "router_min_capacity": 4,
        "router_drop_tks": True,
    }
    if capacity is None:
        return keys
    if isinstance(capacity, str):
        return keys | {_MODE: capacity}
    given = Capacity(**capacity)
    for mode, usual in OPENMOE_CAPACITIES.items():
        if given == dataclasses.replace(usual, factor=given.factor, eval_factor=given.eval_factor):
            return keys | {
                _MODE: mode,
                "router_capacity_factor_train": given.factor,
                "router_capacity_factor_eval": given.eval_factor,
            }
    raise UserError(
        f"OpenMoE's config.json cannot say router_options.capacity = {capacity!r}; set one of "
        f"{', '.join(OPENMOE_CAPACITIES)}, or leave it out"
    )


def _other(value: Any, usual: Any) -> Any:
    """None where a value is the usual one."""
    return None if value == usual else value


def _decimal(value: float) -> float:
    """Without what dividing by the number of layers and multiplying again leaves."""
    return float(f"{value:.12g}")
