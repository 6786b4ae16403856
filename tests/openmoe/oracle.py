"""OpenMoE from its formulas alone, one row of tokens at a time, in float64.

Nothing of the package is used. Weights are named and laid out as the published checkpoints have
them: linear weights ``[out, in]``, expert tensors ``[E, in, out]``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-6
ROPE_BASE = 10000.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a checkpoint's shapes follow from.

    Attributes:
        dim: Model width.
        hidden: Width of dense MLPs and experts.
        layers: Number of layers.
        heads: Attention heads.
        head_dim: Width of a head; heads together may be wider than the model.
        experts: Experts of an MoE layer.
        interval: Layer i (from 0) is MoE where ``(i + 1) % interval == 0``.
        vocab: Rows of the embedding.
    """

    dim: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    experts: int
    interval: int
    vocab: int


def published_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every published tensor."""
    dim, hidden, wide = sizes.dim, sizes.hidden, sizes.heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocab, dim),
        "model.norm.weight": (dim,),
        "lm_head.weight": (sizes.vocab, dim),
    }
    dense = {
        "gate_proj.weight": (2 * hidden, dim),
        "up_proj.weight": (hidden, dim),
        "down_proj.weight": (dim, hidden),
    }
    for layer in range(sizes.layers):
        at = f"model.layers.{layer}."
        shapes[at + "input_layernorm.weight"] = (dim,)
        shapes[at + "post_attention_layernorm.weight"] = (dim,)
        for name in "qkv":
            shapes[f"{at}self_attn.{name}_proj.weight"] = (wide, dim)
        shapes[at + "self_attn.o_proj.weight"] = (dim, wide)
        if (layer + 1) % sizes.interval:
            shapes |= {f"{at}mlp.{name}": shape for name, shape in dense.items()}
            continue
        shapes[at + "mlp.gate_weight"] = (sizes.experts, dim)
        shapes[at + "mlp.experts.wi_gate"] = (sizes.experts, dim, 2 * hidden)
        shapes[at + "mlp.experts.wi_up"] = (sizes.experts, dim, hidden)
        shapes[at + "mlp.experts.wo"] = (sizes.experts, hidden, dim)
        shapes[at + "pre_extra_mlp_layernorm.weight"] = (dim,)
        shapes |= {f"{at}extra_mlp.{name}": shape for name, shape in dense.items()}
    return shapes


def random_checkpoint(sizes: Sizes, seed: int = 0, scale: float = 0.4) -> dict[str, Tensor]:
    """Published tensors with random values; norms vary around 1."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in published_shapes(sizes).items():
        value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        values[name] = value + 1 if "norm" in name else value
    return values


def logits(tensors: Mapping[str, Tensor], tokens: Sequence[int], sizes: Sizes) -> Tensor:
    """The logits after each token of one row, which begins with the beginning-of-text token.

    Position 0 is that token, whose id is the padding's, and every later position sees it.

    Returns:
        ``(S, V)``.
    """
    x_SD = tensors["model.embed_tokens.weight"][list(tokens)]
    for layer in range(sizes.layers):
        at = f"model.layers.{layer}."
        weights = {k.removeprefix(at): v for k, v in tensors.items() if k.startswith(at)}
        x_SD = x_SD + attention(_norm(x_SD, weights["input_layernorm.weight"]), weights, sizes)
        h_SD = _norm(x_SD, weights["post_attention_layernorm.weight"])
        if (layer + 1) % sizes.interval:
            x_SD = x_SD + dense_mlp(h_SD, weights, "mlp.")
        else:
            x_SD = x_SD + torch.stack([moe(h_D, weights) for h_D in h_SD])
            h_SD = _norm(x_SD, weights["pre_extra_mlp_layernorm.weight"])
            x_SD = x_SD + dense_mlp(h_SD, weights, "extra_mlp.")
    return _norm(x_SD, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def attention(h_SD: Tensor, weights: Mapping[str, Tensor], sizes: Sizes) -> Tensor:
    """Every head of every query over its own and earlier positions, scores not scaled."""
    q, k, v = (
        (h_SD @ weights[f"self_attn.{name}_proj.weight"].T).view(-1, sizes.heads, sizes.head_dim)
        for name in "qkv"
    )
    rows = []
    for t in range(len(h_SD)):
        heads = []
        for head in range(sizes.heads):
            query = rotated(q[t, head], t)
            keys = torch.stack([rotated(k[s, head], s) for s in range(t + 1)])
            chance = (keys @ query).softmax(dim=0)
            heads.append(chance @ v[: t + 1, head])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ weights["self_attn.o_proj.weight"].T


def rotated(x_A: Tensor, position: int) -> Tensor:
    """Elements i and i + A/2 turned by ``position * base ** (-2 i / A)``."""
    half = len(x_A) // 2
    out_A = torch.empty_like(x_A)
    for i in range(half):
        angle = position * ROPE_BASE ** (-2 * i / len(x_A))
        cos, sin = math.cos(angle), math.sin(angle)
        out_A[i] = x_A[i] * cos - x_A[i + half] * sin
        out_A[i + half] = x_A[i + half] * cos + x_A[i] * sin
    return out_A


def dense_mlp(h_SD: Tensor, weights: Mapping[str, Tensor], prefix: str) -> Tensor:
    """``(a * silu(b) * u) W_down``, where ``[a | b]`` comes of the gate's matrix."""
    a, b = (h_SD @ weights[prefix + "gate_proj.weight"].T).chunk(2, dim=-1)
    u = h_SD @ weights[prefix + "up_proj.weight"].T
    return (a * _silu(b) * u) @ weights[prefix + "down_proj.weight"].T


def moe(h_D: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The two likeliest experts, each times its probability among all."""
    chance_E = (weights["mlp.gate_weight"] @ h_D).softmax(dim=0)
    y_D = torch.zeros_like(h_D)
    for expert in sorted(range(len(chance_E)), key=lambda e: -float(chance_E[e]))[:2]:
        a, b = (h_D @ weights["mlp.experts.wi_gate"][expert]).chunk(2)
        u = h_D @ weights["mlp.experts.wi_up"][expert]
        y_D += chance_E[expert] * ((a * _silu(b) * u) @ weights["mlp.experts.wo"][expert])
    return y_D


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """T5's: no mean is subtracted and no bias added."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * weight
