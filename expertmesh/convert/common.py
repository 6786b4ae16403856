"""What Mixtral, OLMoE and Qwen3-MoE have in common: LLaMA's names and keys around their experts.

Kinds of files: ``published``, with three matrices of each expert, and ``stacked``, as transformers
5 holds them: ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F].
"""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from expertmesh.convert.check import unlike, usual_experts
from expertmesh.convert.family import EXPERT_DROPOUT, Family
from expertmesh.convert.layout import Layout, Piece
from expertmesh.convert.pieces import experts_apart, experts_stacked, in_a_row
from expertmesh.convert.rope import rope_theta
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig

KINDS = ("published", "stacked")
_STACKED = "mlp.experts.gate_up_proj"
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts_per_tok",
)
# What no decoder here is, where a key says it.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
# Options of the router that keys of every family say.
_SAID = ("balance_coef",)


class ExpertNames(NamedTuple):
    """What a family calls the tensors of an MoE layer, below the layer's own name.

    Attributes:
        router: The router's matrix, [E, D].
        gate: An expert's matrix before the activation, [F, D], with ``{expert}`` for its number.
        up: The one beside it.
        down: The one back, [D, F].
    """

    router: str
    gate: str
    up: str
    down: str


class UsualKeys(NamedTuple):
    """What keys mean that are missing, as in transformers' class of the family.

    Attributes:
        num_key_value_heads: None is as many as heads.
        num_experts_per_tok: K.
        max_position_embeddings: Longest sequence.
        rms_norm_eps: Of every norm.
    """

    num_key_value_heads: int | None
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float


class LlamaLike(Family):
    """LLaMA's decoder with experts in place of some of its MLPs.

    Attributes:
        model_type: In ``config.json``.
        architecture: Likewise.
        experts: Names in published files.
        qk_norm: As in ``DecoderConfig``.
        router: The router's preset.
        usual: What missing keys mean, where families differ.
        usual_theta: Likewise the base of the rotary wavelengths.
        said: Values of the router's options that keys of this family alone say.
    """

    kinds = KINDS
    model_type: str
    architecture: str
    experts: ExpertNames
    qk_norm: Literal["none", "head", "full"]
    router: str
    usual: UsualKeys
    usual_theta: float
    said: tuple[tuple[str, Any], ...] = ()

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        return keys.get("model_type") == self.model_type

    def decoder_config(self, keys: Mapping[str, Any]) -> DecoderConfig:
        keys = {**self.usual._asdict(), **keys}
        check_keys(keys, self.name)
        try:
            fields = shared_fields(keys, self.usual_theta) | self.own_fields(keys)
        except KeyError as error:
            raise _lacking(str(error.args[0]), self.name) from error
        options = dict(keys.get("router_options", {})) | fields.pop("router_options")
        if (coef := keys.get("router_aux_loss_coef")) is not None:
            options["balance_coef"] = coef
        return DecoderConfig(
            **fields, qk_norm=self.qk_norm, router=self.router, router_options=options
        )

    def published_config(self, config: DecoderConfig) -> dict[str, Any]:
        self.check(config)
        keys = {"architectures": [self.architecture], "model_type": self.model_type}
        keys |= shared_keys(config) | self.own_keys(config)
        options = {
            key: value
            for key, value in config.router_options.items()
            if key not in _SAID and (key, value) not in self.said
        }
        return keys | ({"router_options": options} if options else {})

    def layout(self, config: DecoderConfig, kind: str) -> Layout:
        if kind not in self.kinds:
            raise UserError(f"kind must be one of {', '.join(self.kinds)}, got {kind!r}")
        self.check(config)
        return Layout(self._pieces(config, kind))

    def kind_of(self, names: Collection[str]) -> str:
        return "stacked" if any(name.endswith(_STACKED) for name in names) else "published"

    @abstractmethod
    def own_fields(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of ``DecoderConfig`` that this family's keys say, with ``router_options``."""

    @abstractmethod
    def own_keys(self, config: DecoderConfig) -> dict[str, Any]:
        """Keys that only this family has."""

    def fixed(self) -> dict[str, Any]:
        """Fields that a model must have to be of this family."""
        return {
            "mlp": "gated",
            "extra_mlp": False,
            "attention": "gqa",
            "attention_scale": None,
            "qk_norm": self.qk_norm,
            "position": "rotary",
            "activation": "silu",
            "num_shared_experts": 0,
            "router": self.router,
        }

    def check(self, config: DecoderConfig) -> None:
        """Raise unless a model is of this family."""
        if wrong := unlike(vars(config), self.fixed() | usual_experts(config)):
            raise UserError(f"{self.name} has no model with {wrong}")

    def _pieces(self, config: DecoderConfig, kind: str) -> Iterator[Piece]:
        dim, width = config.dim, config.head_width
        heads, kv_heads = config.num_heads * width, config.kv_heads * width
        yield from _same("embedding", (config.vocab_size, dim), "model.embed_tokens")
        yield from _same("norm", (dim,), "model.norm")
        if not config.tied_embeddings:
            yield from _same("head", (config.vocab_size, dim), "lm_head")
        for block in range(config.num_layers):
            ours, theirs = f"blocks.{block}", f"model.layers.{block}"
            attention = f"{theirs}.self_attn"
            yield from _same(f"{ours}.attention_norm", (dim,), f"{theirs}.input_layernorm")
            yield from _same(f"{ours}.attention.q", (heads, dim), f"{attention}.q_proj")
            yield from _same(f"{ours}.attention.k", (kv_heads, dim), f"{attention}.k_proj")
            yield from _same(f"{ours}.attention.v", (kv_heads, dim), f"{attention}.v_proj")
            yield from _same(f"{ours}.attention.out", (dim, heads), f"{attention}.o_proj")
            for name, length in _norms(config).items():
                yield from _same(f"{ours}.attention.{name}", (length,), f"{attention}.{name}")
            norm = f"{theirs}.post_attention_layernorm"
            if config.is_moe(block):
                yield from _same(f"{ours}.moe_norm", (dim,), norm)
                yield from self._moe(config, f"{ours}.moe", theirs, kind)
            else:
                yield from _same(f"{ours}.mlp_norm", (dim,), norm)
                yield from _dense(config, f"{ours}.mlp", f"{theirs}.mlp")

    def _moe(self, config: DecoderConfig, ours: str, theirs: str, kind: str) -> Iterator[Piece]:
        count, dim, hidden = config.num_experts, config.dim, config.expert_hidden
        inner, outer = (count, hidden, dim), (count, dim, hidden)
        gate_up, down = f"{ours}.experts.gate_up", f"{ours}.experts.down"
        router = self.experts.router if kind == "published" else "mlp.gate.weight"
        yield from in_a_row([f"{ours}.router.weight_ED"], (count, dim), f"{theirs}.{router}")
        if kind == "stacked":
            yield from experts_stacked(gate_up, inner, (0, 1), f"{theirs}.{_STACKED}")
            yield from experts_stacked(down, outer, None, f"{theirs}.mlp.experts.down_proj")
        else:
            yield from experts_apart(gate_up, inner, (0,), f"{theirs}.{self.experts.gate}")
            yield from experts_apart(gate_up, inner, (1,), f"{theirs}.{self.experts.up}")
            yield from experts_apart(down, outer, None, f"{theirs}.{self.experts.down}")


def check_keys(keys: Mapping[str, Any], name: str) -> None:
    """Raise if keys are missing that every one of these models has, or say what none is."""
    if missing := [key for key in _NEEDED if keys.get(key) is None]:
        raise _lacking(", ".join(missing), name)
    refuse(keys, _FIXED, name)


def _lacking(missing: str, name: str) -> UserError:
    return UserError(f"the configuration has no {missing}; expected {name}'s keys")


def refuse(keys: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> None:
    """Raise if a key that is there says something else than is wanted."""
    if wrong := unlike(keys, wanted):
        raise UserError(f"{name} is not supported with {wrong}")


def shared_fields(keys: Mapping[str, Any], usual_theta: float) -> dict[str, Any]:
    """Fields of ``DecoderConfig`` that the common keys say."""
    dim, heads = keys["hidden_size"], keys["num_attention_heads"]
    kv_heads, head_dim = keys["num_key_value_heads"], keys.get("head_dim")
    return {
        "vocab_size": keys["vocab_size"],
        "dim": dim,
        "num_layers": keys["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": None if kv_heads == heads else kv_heads,
        "head_dim": None if head_dim in (None, dim // heads) else head_dim,
        "rope_theta": rope_theta(keys, usual_theta),
        "max_seq_len": keys["max_position_embeddings"],
        "norm_eps": keys["rms_norm_eps"],
        "experts_per_token": keys["num_experts_per_tok"],
        "tied_embeddings": bool(keys.get("tie_word_embeddings", False)),
        "init_std": keys.get("initializer_range", 0.02),
        "dropout": keys.get("dropout_rate", 0.0),
        "expert_dropout": keys.get(EXPERT_DROPOUT, 0.0),
    }


def shared_keys(config: DecoderConfig) -> dict[str, Any]:
    """The common keys; where transformers 5 has others than 4, both."""
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        # transformers 4 knows this key alone, and 5 follows the table. Reading refuses two values,
        # so that an edit of one is not in vain.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "num_experts_per_tok": config.experts_per_token,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
    }
    if config.dropout:
        keys["dropout_rate"] = config.dropout
    if config.expert_dropout:
        keys[EXPERT_DROPOUT] = config.expert_dropout
    if (coef := config.router_options.get("balance_coef")) is not None:
        keys["router_aux_loss_coef"] = coef
    return keys


def _same(ours: str, shape: tuple[int, ...], theirs: str) -> Iterator[Piece]:
    return in_a_row([f"{ours}.weight"], shape, f"{theirs}.weight")


def _norms(config: DecoderConfig) -> dict[str, int]:
    """Lengths of the norms of queries and keys."""
    width = config.head_width
    if config.qk_norm == "none":
        return {}
    if config.qk_norm == "head":
        return {"q_norm": width, "k_norm": width}
    return {"q_norm": config.num_heads * width, "k_norm": config.kv_heads * width}


def _dense(config: DecoderConfig, ours: str, theirs: str) -> Iterator[Piece]:
    hidden = config.dense_hidden or 0
    yield from _same(f"{ours}.gate", (hidden, config.dim), f"{theirs}.gate_proj")
    yield from _same(f"{ours}.up", (hidden, config.dim), f"{theirs}.up_proj")
    yield from _same(f"{ours}.down", (config.dim, hidden), f"{theirs}.down_proj")
