"""Qwen3-MoE (arXiv 2505.09388)."""

from collections.abc import Mapping
from typing import Any, final

from expertmesh.convert.common import ExpertNames, LlamaLike, UsualKeys, refuse
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig


@final
class Qwen3Moe(LlamaLike):
    """Qwen3-MoE: ``Qwen/Qwen3-30B-A3B`` and its sisters."""

    name = "qwen3-moe"
    presets = ("qwen3-30b-a3b",)
    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    experts = ExpertNames(
        router="mlp.gate.weight",
        gate="mlp.experts.{expert}.gate_proj.weight",
        up="mlp.experts.{expert}.up_proj.weight",
        down="mlp.experts.{expert}.down_proj.weight",
    )
    qk_norm = "head"
    router = "qwen3_moe"
    usual = UsualKeys(
        num_key_value_heads=4,
        num_experts_per_tok=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
    )
    usual_theta = 1e4
    said = (("renormalize", "no"), ("renormalize", "chosen"))

    def own_fields(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        refuse(keys, {"use_sliding_window": False}, self.name)
        dense = sorted(keys.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            raise UserError(
                f"qwen3-moe is supported with its first layers dense, and not with "
                f"mlp_only_layers = {dense}"
            )
        num_layers, every = keys["num_hidden_layers"], keys.get("decoder_sparse_step", 1)
        all_moe = every == 1 and not dense
        return {
            "num_experts": keys.get("num_experts", keys.get("num_local_experts", 128)),
            "expert_hidden": keys["moe_intermediate_size"],
            "dense_hidden": None if all_moe else keys["intermediate_size"],
            "moe_every": every,
            # Those that are no MoE layers anyway are sometimes listed too.
            "first_dense": min(len(dense), num_layers) if len(dense) >= every else 0,
            "router_options": {} if keys.get("norm_topk_prob") else {"renormalize": "no"},
        }

    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        return {
            "num_experts": config.num_experts,
            "moe_intermediate_size": config.expert_hidden,
            "intermediate_size": config.dense_hidden or config.expert_hidden,
            "decoder_sparse_step": config.moe_every,
            "mlp_only_layers": list(range(config.first_dense)),
            "norm_topk_prob": config.router_options.get("renormalize", "chosen") != "no",
            "use_sliding_window": False,
            "attention_bias": False,
        }
