"""OLMoE (arXiv 2409.02060)."""

from collections.abc import Mapping
from typing import Any, final

from expertmesh.convert.common import ExpertNames, LlamaLike, UsualKeys, refuse
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig


@final
class Olmoe(LlamaLike):
    """OLMoE: ``allenai/OLMoE-1B-7B-0924`` and its successors."""

    name = "olmoe"
    presets = ("olmoe-1b-7b",)
    model_type, architecture = "olmoe", "OlmoeForCausalLM"
    experts = ExpertNames(
        router="mlp.gate.weight",
        gate="mlp.experts.{expert}.gate_proj.weight",
        up="mlp.experts.{expert}.up_proj.weight",
        down="mlp.experts.{expert}.down_proj.weight",
    )
    qk_norm = "full"
    router = "olmoe"
    said = (("renormalize", "no"), ("renormalize", "chosen"))
    usual = UsualKeys(
        num_key_value_heads=None,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    usual_theta = 1e4

    def own_fields(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        refuse(keys, {"clip_qkv": None}, self.name)
        # Of two rules under which it is true, our own key says which.
        named = "renormalize" in keys.get("router_options", {})
        chosen = keys.get("norm_topk_prob") and not named
        return {
            "num_experts": keys.get("num_experts", keys.get("num_local_experts", 64)),
            "expert_hidden": keys["intermediate_size"],
            "router_options": {"renormalize": "chosen"} if chosen else {},
        }

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "num_experts": config.num_experts,
            "intermediate_size": config.expert_hidden,
            "norm_topk_prob": config.router_options.get("renormalize", "no") != "no",
            "clip_qkv": None,
            "attention_bias": False,
        }

    def check(self, config: DecoderConfig) -> None:
        super().check(config)
        # Its norms of queries and keys are as long as the model is wide, whatever head_dim says.
        if config.head_width != (usual := config.dim // config.num_heads):
            raise UserError(
                f"olmoe has no model with head_dim = {config.head_dim} (expected {usual}: "
                "dim / num_heads)"
            )

    def fixed(self) -> dict[str, Any]:
        return super().fixed() | {"moe_every": 1, "first_dense": 0}
