"""OpenMoE's tensors in each kind of file, written out one after the other."""

import torch
from torch import Tensor

from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset

CONFIG = decoder_preset("openmoe-test", vocab_size=40, num_kv_heads=2)


def model(seed: int = 0, config: DecoderConfig = CONFIG) -> DecoderLM:
    """A model whose norms are not all 1, so that none can be taken for another."""
    made = DecoderLM(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, param in made.named_parameters():
        if param.dim() == 1:
            assert "norm" in name
            param.data.normal_(generator=generator)
    return made


def published(model: DecoderLM) -> dict[str, Tensor]:
    state = model.state_dict()
    tensors = {
        "model.embed_tokens.weight": state["embedding.weight"],
        "model.norm.weight": state["norm.weight"],
        "lm_head.weight": state["head.weight"],
    }
    for i in range(model.config.num_layers):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        tensors[f"{theirs}input_layernorm.weight"] = state[f"{ours}attention_norm.weight"]
        for our_name, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
            weight = state[f"{ours}attention.{our_name}.weight"]
            tensors[f"{theirs}self_attn.{name}_proj.weight"] = weight
        norm = f"{theirs}post_attention_layernorm.weight"
        if not model.config.is_moe(i):
            tensors[norm] = state[f"{ours}mlp_norm.weight"]
            tensors |= _dense(state, f"{ours}mlp.", f"{theirs}mlp.")
            continue
        tensors[norm] = state[f"{ours}moe_norm.weight"]
        tensors[f"{theirs}pre_extra_mlp_layernorm.weight"] = state[f"{ours}extra_norm.weight"]
        tensors |= _dense(state, f"{ours}extra_mlp.", f"{theirs}extra_mlp.")
        tensors[f"{theirs}mlp.gate_weight"] = state[f"{ours}moe.router.weight_ED"]
        linear, gate, up = state[f"{ours}moe.experts.gates_up"].unbind(1)
        both = torch.cat([linear.mT, gate.mT], dim=2)
        tensors[f"{theirs}mlp.experts.wi_gate"] = both
        tensors[f"{theirs}mlp.experts.wi_up"] = up.mT
        tensors[f"{theirs}mlp.experts.wo"] = state[f"{ours}moe.experts.down"].mT
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def per_expert(model: DecoderLM) -> dict[str, Tensor]:
    return as_per_expert(published(model))


def t5x(model: DecoderLM) -> dict[str, Tensor]:
    return as_t5x(published(model))


def as_per_expert(published: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in published.items():
        if name.endswith("mlp.gate_weight"):
            tensors[name.replace("gate_weight", "gate.weight")] = tensor
        elif ".experts." in name:
            stem, _, kind = name.rpartition(".")
            projection = {"wi_gate": "gate_proj", "wi_up": "up_proj", "wo": "down_proj"}[kind]
            for expert, matrix in enumerate(tensor):
                tensors[f"{stem}.{expert}.{projection}.weight"] = matrix.T.contiguous()
        else:
            tensors[name] = tensor
    return tensors


def as_t5x(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """By path below ``target``."""
    tensors = {}
    words = {
        "model.embed_tokens.weight": "token_embedder/embedding",
        "model.norm.weight": "decoder/decoder_norm/scale",
        "lm_head.weight": "decoder/logits_dense/kernel",
        "input_layernorm.weight": "pre_self_attention_layer_norm/scale",
        "post_attention_layernorm.weight": "pre_mlp_layer_norm/scale",
        "pre_extra_mlp_layernorm.weight": "pre_extra_mlp_layer_norm/scale",
        "self_attn.q_proj.weight": "self_attention/query/kernel",
        "self_attn.k_proj.weight": "self_attention/key/kernel",
        "self_attn.v_proj.weight": "self_attention/value/kernel",
        "self_attn.o_proj.weight": "self_attention/out/kernel",
        "mlp.gate_weight": "mlp/router/router_weights/w/kernel",
        "mlp.experts.wi_gate": "mlp/expert/wi_0/kernel",
        "mlp.experts.wi_up": "mlp/expert/wi_1/kernel",
        "mlp.experts.wo": "mlp/expert/wo/kernel",
    }
    for mlp in ("mlp", "extra_mlp"):
        for name, word in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            words[f"{mlp}.{name}_proj.weight"] = f"{mlp}/{word}/kernel"
    for name, tensor in published.items():
        path = words.get(name)
        if path is None:
            _, _, layer, rest = name.split(".", 3)
            path = f"decoder/layers_{layer}/{words[rest]}"
        turned = path.endswith("kernel") and "/expert/" not in path
        tensors[path] = tensor.T.contiguous() if turned else tensor
    return tensors


def _dense(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    both = torch.cat([state[f"{ours}linear.weight"], state[f"{ours}gate.weight"]])
    return {
        f"{theirs}gate_proj.weight": both,
        f"{theirs}up_proj.weight": state[f"{ours}up.weight"],
        f"{theirs}down_proj.weight": state[f"{ours}down.weight"],
    }


BY_KIND = {"published": published, "per-expert": per_expert, "t5x": t5x}
