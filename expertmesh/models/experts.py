"""The routed experts of a decoder, in the convention of the model that its router comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from expertmesh.experts import DoublyGatedMLPExperts, Experts, GatedMLPExperts
from expertmesh.experts.scaled_input import ScaledInputExperts

if TYPE_CHECKING:
    from expertmesh.models.config import DecoderConfig

OF_ROUTER = {"llama4": "scaled_input", "gpt_oss": "gpt_oss"}
"""Routers whose models have experts of another form than ``"plain"``."""


def build_experts(config: DecoderConfig) -> Experts:
    """The experts of one MoE layer."""
    options: dict[str, Any] = {
        "activation": config.activation,
        "init_std": config.init_std,
        "dropout": config.expert_dropout,
        "seed": 0,
    }
    return FORMS[form_of(config)](config, options)


def form_of(config: DecoderConfig) -> str:
    """``config.expert_form``, with ``"auto"`` resolved."""
    if config.expert_form != "auto":
        return config.expert_form
    return OF_ROUTER.get(config.router, "plain")


def num_biases(config: DecoderConfig) -> int:
    """Elements of one expert's biases."""
    return 2 * config.expert_hidden + config.dim if form_of(config) == "gpt_oss" else 0


def _plain(config: DecoderConfig, options: dict[str, Any]) -> Experts:
    kind = DoublyGatedMLPExperts if config.mlp == "doubly_gated" else GatedMLPExperts
    return kind(config.dim, config.expert_hidden, config.num_experts, **options)


def _scaled_input(config: DecoderConfig, options: dict[str, Any]) -> Experts:
    """Llama 4: the weight multiplies what goes in."""
    return ScaledInputExperts(_plain(config, options))


def _gpt_oss(config: DecoderConfig, options: dict[str, Any]) -> Experts:
    """gpt-oss: clamped SwiGLU, biases everywhere."""
    options |= {"activation": "clamped_swiglu", "bias": True}
    return GatedMLPExperts(config.dim, config.expert_hidden, config.num_experts, **options)


FORMS: dict[str, Callable[[DecoderConfig, dict[str, Any]], Experts]] = {
    "plain": _plain,
    "scaled_input": _scaled_input,
    "gpt_oss": _gpt_oss,
}
"""Forms by name."""
