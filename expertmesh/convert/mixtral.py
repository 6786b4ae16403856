"""Mixtral (arXiv 2401.04088)."""

from collections.abc import Mapping
from typing import Any, final

from expertmesh.convert.common import ExpertNames, LlamaLike, UsualKeys, refuse
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig


@final
class Mixtral(LlamaLike):
    """Mixtral: ``mistralai/Mixtral-8x7B-v0.1`` and those trained from it."""

    name = "mixtral"
    presets = ("mixtral-8x7b",)
    model_type, architecture = "mixtral", "MixtralForCausalLM"
    experts = ExpertNames(
        router="block_sparse_moe.gate.weight",
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    )
    qk_norm = "none"
    router = "mixtral"
    usual = UsualKeys(
        num_key_value_heads=8,
        num_experts_per_tok=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    )
    usual_theta = 1e6

    def own_fields(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        refuse(keys, {"router_jitter_noise": 0.0}, self.name)
        window, longest = keys.get("sliding_window"), keys["max_position_embeddings"]
        if window is not None and window < longest:
            raise UserError(
                f"mixtral is not supported with sliding_window = {window} below "
                f"max_position_embeddings = {longest} (expected None)"
            )
        return {
            "num_experts": keys.get("num_local_experts", 8),
            "expert_hidden": keys["intermediate_size"],
            "router_options": {},
        }

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "num_local_experts": config.num_experts,
            "intermediate_size": config.expert_hidden,
            "sliding_window": None,
        }

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"moe_every": 1, "first_dense": 0}
