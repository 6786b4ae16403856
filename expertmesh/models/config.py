"""The shape of a decoder language model, checked, and what it costs by arithmetic."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from expertmesh.models import counts
from expertmesh.models.validation import check_config
from expertmesh.routing import Router
from expertmesh.routing.registry import RouterSite, build_router


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model: pre-norm blocks of attention and a dense MLP or an MoE layer.

    Raises:
        ValueError: If a value is out of range, or set where it would do nothing.
    """

    vocab_size: int
    """Number of token ids."""

    dim: int
    """Model width D."""

    num_layers: int
    """Number of blocks."""

    num_heads: int
    """Query heads H of a block."""

    num_kv_heads: int | None = None
    """Key and value heads of ``"gqa"``; divides ``num_heads``. None: as many as heads."""

    head_dim: int | None = None
    """Width of a head of ``"gqa"``. None: ``dim / num_heads``."""

    attention: Literal["gqa", "mla"] = "gqa"
    """Grouped-query attention, or DeepSeek-V2's multi-head latent attention."""

    q_lora_rank: int | None = None
    """``"mla"``: width of the queries' latent. None: queries are projected directly."""

    kv_lora_rank: int | None = None
    """``"mla"``: width of the latent of keys and values."""

    qk_nope_head_dim: int | None = None
    """``"mla"``: width of the part of a head's query and key that carries no position."""

    qk_rope_head_dim: int | None = None
    """``"mla"``: width of the part that does; even."""

    v_head_dim: int | None = None
    """``"mla"``: width of a head's value."""

    qk_norm: Literal["none", "head", "full"] = "none"
    """``"gqa"``: norm of queries and keys, by head (Qwen3) or over the projection (OLMoE)."""

    attention_scale: float | None = None
    """``"gqa"``: multiplies the scores. None: ``head_width ** -0.5``. OpenMoE has 1."""

    position: Literal["rotary", "learned", "none"] = "rotary"
    """Rotary angles, a learned vector per position, or nothing but the causal mask."""

    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""

    max_seq_len: int = 2048
    """Longest sequence meant; learned positions cannot go beyond it."""

    norm_eps: float = 1e-6
    """Added to the mean square in every norm."""

    mlp: Literal["gated", "doubly_gated"] = "gated"
    """Dense MLPs, shared and routed experts: ``act(gate) * up``, or ``linear * act(gate) * up``."""

    dense_hidden: int | None = None
    """Hidden width of the dense MLPs; None if there are none."""

    extra_mlp: bool = False
    """MoE blocks end with a dense MLP, on a norm of its own, after the MoE layer (OpenMoE)."""

    moe_every: int = 1
    """Every n-th block is MoE: block i (from 0) where ``(i + 1) % moe_every == 0``."""

    first_dense: int = 0
    """The first so many blocks are dense."""

    num_experts: int = 0
    """Routed experts E of an MoE block; 0 makes a dense model."""

    experts_per_token: int = 0
    """Choices K of a token; between 1 and E."""

    expert_hidden: int = 0
    """Hidden width F of an expert."""

    expert_form: Literal["auto", "plain", "scaled_input", "gpt_oss"] = "auto"
    """Routed experts' convention: ``"plain"``; ``"scaled_input"``, Llama 4's, where the weight
    multiplies what goes in; ``"gpt_oss"``, clamped SwiGLU with biases. ``"auto"`` takes what the
    router's model has: those two with their routers, else plain."""

    num_shared_experts: int = 0
    """Experts that every token takes, as one gated MLP of this many times F."""

    router: str = "mixtral"
    """Name of the router: a preset, or another family (docs/routing.md has them all)."""

    router_options: dict[str, Any] = field(default_factory=dict)
    """Overrides of that preset by its own argument names, or the family's options."""

    activation: str = "silu"
    """Gate's activation, in experts (but those of ``"gpt_oss"``) and dense MLPs."""

    dropout: float = 0.0
    """Probability that training drops an element of what a block adds to the residual."""

    expert_dropout: float = 0.0
    """Probability that training drops a hidden unit of a routed expert; Switch fine-tunes with 0.4
    here and 0.1 for ``dropout``."""

    tied_embeddings: bool = False
    """The output's weight is the embedding."""

    init_std: float = 0.02
    """Standard deviation of the initial weights; routers follow their preset."""

    losses: Literal["attach", "return"] = "attach"
    """Balance losses join the gradient where they arise, or are left for ``MoELoss``."""

    def __post_init__(self) -> None:
        check_config(self)
        if self.num_experts:
            # On the meta device this costs nothing; the router checks its own options.
            with torch.device("meta"):
                self.build_router()

    @property
    def kv_heads(self) -> int:
        """Key and value heads of grouped attention."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of a head of grouped attention."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    def is_moe(self, index: int) -> bool:
        """Whether block ``index`` (from 0) holds experts."""
        return (
            self.num_experts > 0 and index >= self.first_dense and (index + 1) % self.moe_every == 0
        )

    @property
    def num_moe_layers(self) -> int:
        """Number of blocks with experts."""
        return sum(self.is_moe(index) for index in range(self.num_layers))

    def build_router(self, layer: int = 0) -> Router:
        """The router of block ``layer``, whose random draws are set apart by this number."""
        site = RouterSite(
            dim=self.dim,
            num_experts=self.num_experts,
            k=self.experts_per_token,
            vocab_size=self.vocab_size,
            max_seq_len=self.max_seq_len,
            layer=layer,
        )
        return build_router(self.router, site, self.router_options)

    @property
    def num_params(self) -> int:
        """Parameters of the model; a tied embedding is counted once."""
        return counts.num_params(self)

    @property
    def num_active_params(self) -> int:
        """Parameters that one token may touch: K of the E experts, and all else once."""
        return counts.num_active_params(self)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating point operations of the forward pass, per token, in a sequence of ``seq_len``.

        Two for each weight of a matrix that the token is multiplied with (projections, K experts,
        shared experts, router, output; not the embedding, which is looked up), and for attention
        ``2 H (A + V) (seq_len + 1) / 2`` in each block, where A and V are the widths of a head's
        key and value and ``(seq_len + 1) / 2`` is the mean number of keys that a query sees.
        Norms, activations and softmax are left out. A training step takes three times as many.
        """
        return counts.flops_per_token(self, seq_len)
