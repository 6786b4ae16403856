"""Random folders laid out as the published OpenMoE checkpoints are, written name by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from expertmesh.models import DecoderLM, decoder_preset

VOCAB = 512

# The 8B's numbers under the names of ColossalAI's own files, whose code reads other names.
OLDER_KEYS: dict[str, Any] = {
    "architectures": ["OpenMoeForCausalLM"],
    "intermediate_size": 8192,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "head_dim": 128,
    "num_attention_heads": 24,
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-06,
    "vocab_size": 256384,
    "hidden_act": "swiglu",
    "num_experts": 32,
    "topk": 2,
    "capacity_factor_train": 1.25,
    "capacity_factor_eval": 2.0,
    "min_capacity": 4,
    "noisy_policy": None,
    "drop_tks": True,
    "expert_parallel": None,
    "gated": True,
    "moe_layer_interval": 6,
}


def published_tensors(model: DecoderLM) -> dict[str, Tensor]:
    """Every tensor under its published name and in its published shape."""
    tensors = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for index, block in enumerate(model.blocks):
        layer = f"model.layers.{index}"
        attention = block.attention
        tensors |= {
            f"{layer}.input_layernorm.weight": block.attention_norm.weight,
            f"{layer}.self_attn.q_proj.weight": attention.q.weight,
            f"{layer}.self_attn.k_proj.weight": attention.k.weight,
            f"{layer}.self_attn.v_proj.weight": attention.v.weight,
            f"{layer}.self_attn.o_proj.weight": attention.out.weight,
        }
        if not hasattr(block, "moe"):
            tensors[f"{layer}.post_attention_layernorm.weight"] = block.mlp_norm.weight
            tensors |= _mlp(f"{layer}.mlp", block.mlp)
            continue
        experts = block.moe.experts
        linear, gate, up = experts.gates_up.transpose(2, 3).unbind(1)
        tensors |= {
            f"{layer}.post_attention_layernorm.weight": block.moe_norm.weight,
            f"{layer}.pre_extra_mlp_layernorm.weight": block.extra_norm.weight,
            f"{layer}.mlp.gate_weight": block.moe.router.weight_ED,
            f"{layer}.mlp.experts.wi_gate": torch.cat([linear, gate], dim=2),
            f"{layer}.mlp.experts.wi_up": up,
            f"{layer}.mlp.experts.wo": experts.down.transpose(1, 2),
        }
        tensors |= _mlp(f"{layer}.extra_mlp", block.extra_mlp)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _mlp(name: str, mlp: Any) -> dict[str, Tensor]:
    return {
        f"{name}.gate_proj.weight": torch.cat([mlp.linear.weight, mlp.gate.weight]),
        f"{name}.up_proj.weight": mlp.up.weight,
        f"{name}.down_proj.weight": mlp.down.weight,
    }


def published_keys(model: DecoderLM, *, auto_map: bool = False, **keys: Any) -> dict[str, Any]:
    """A ``config.json`` as on the hub: LLaMA's by its own word."""
    config = model.config
    written = {
        "architectures": ["OpenMoeForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 0,
        "dropout_rate": 0.0,
        "enable_comm_overlap": False,
        "enable_hierarchical_alltoall": False,
        "enable_kernel": False,
        "enable_load_balance": False,
        "eos_token_id": 1,
        "expert_parallel": None,
        "head_dim": config.head_width,
        "hidden_act": "swiglu",
        "hidden_size": config.dim,
        "initializer_range": 0.02,
        "intermediate_size": config.dense_hidden,
        "label_smoothing": 0.001,
        "layer_norm_epsilon": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "mlp_gated": True,
        "model_type": "llama",
        "moe_layer_interval": config.moe_every,
        "num_attention_heads": config.num_heads,
        "num_experts": config.num_experts,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "router_aux_loss_factor": 0.01,
        "router_capacity_factor_eval": 2.0,
        "router_capacity_factor_train": 1.25,
        "router_drop_tks": True,
        "router_min_capacity": 4,
        "router_noisy_policy": None,
        "router_topk": config.experts_per_token,
        "router_z_loss_factor": 0.0001,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.34.0",
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "z_loss_factor": 0.01,
    }
    if auto_map:
        written["auto_map"] = {"AutoModelForCausalLM": "modeling_openmoe.OpenMoeForCausalLM"}
    return written | keys


def write_folder(
    path: Path,
    *,
    size: str = "test",
    vocab_size: int = VOCAB,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    auto_map: bool = False,
    tokenizer: Path | None = None,
    keys: dict[str, Any] | None = None,
    **shape: Any,
) -> DecoderLM:
    """Write a random published-style folder.

    Args:
        path: Made if it is not there.
        size: Of the preset ``openmoe-SIZE``.
        vocab_size: Rows of the embedding.
        seed: Of the values.
        dtype: Of the files and the model.
        num_shards: Safetensors files; 1 has no index, 0 writes a pickle instead.
        auto_map: Whether ``config.json`` names code of the hub.
        tokenizer: umT5's ``spiece.model``, copied with a configuration beside it.
        keys: Written over those of ``config.json``.
        shape: Other fields of the preset.

    Returns:
        The decoder with the values of the folder, in evaluation.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = decoder_preset(f"openmoe-{size}", vocab_size=vocab_size, **shape)
    model = DecoderLM(config, seed=seed).to(dtype).eval()
    tensors = published_tensors(model)
    _write_tensors(path, tensors, num_shards)
    written = published_keys(model, auto_map=auto_map, torch_dtype=str(dtype).split(".")[1])
    (path / "config.json").write_text(json.dumps(written | (keys or {})))
    if tokenizer is not None:
        shutil.copy(tokenizer, path / "spiece.model")
        settings = {"tokenizer_class": "OpenMoeTokenizer", "extra_ids": 300, "bos_token": "<s>"}
        if auto_map:
            settings["auto_map"] = {
                "AutoTokenizer": ["tokenization_openmoe.OpenMoeTokenizer", None]
            }
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def _write_tensors(path: Path, tensors: dict[str, Tensor], num_shards: int) -> None:
    if num_shards == 0:
        torch.save(tensors, path / "pytorch_model.bin")
    elif num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        names = sorted(tensors)
        place = {name: files[i % num_shards] for i, name in enumerate(names)}
        for file in files:
            part = {name: tensors[name] for name in names if place[name] == file}
            save_file(part, path / file, metadata={"format": "pt"})
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": place}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
