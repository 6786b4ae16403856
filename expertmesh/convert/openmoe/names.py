"""The one table of OpenMoE's names: our parameters, the published tensors, those of t5x.

Rows hold names of one tensor in each world; everything else follows from the rules below the
table. ``i`` is the block, from 0. Letters stand for lengths: V vocabulary, D model width, A and K
all heads' queries and keys, F hidden width of a dense MLP, H of an expert, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from expertmesh.convert.check import unlike
from expertmesh.convert.layout import Layout, Piece
from expertmesh.convert.pieces import experts_apart, experts_stacked, in_a_row
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig


class _Row(NamedTuple):
    """A published tensor that every token uses.

    Attributes:
        published: Its name in the published checkpoints.
        t5x: Its name in JAX's.
        ours: The parameters that it holds, one after the other along its first dim.
        shape: Of each of them. ``"VD"`` is [V, D].
        per_expert: Its name in folders of one tensor per expert, where that is another.
    """

    published: str
    t5x: str
    ours: tuple[str, ...]
    shape: str
    per_expert: str | None = None


class _ExpertRow(NamedTuple):
    """A published tensor of all experts of a layer.

    Attributes:
        published: Its name; the shape is [E, in, out].
        t5x: JAX's name of the same array.
        per_expert: The name of one expert's; the shape is [out, in].
        ours: The parameter that it is, or is part of.
        parts: Places in the parameter's second dim, of what follows one another along ``out``;
            None where the parameter is [E, out, in].
        shape: [out, in] of each part.
    """

    published: str
    t5x: str
    per_expert: str
    ours: str
    parts: tuple[int, ...] | None
    shape: str


_MODEL = (
    _Row("model.embed_tokens.weight", "token_embedder/embedding", ("embedding.weight",), "VD"),
    _Row("model.norm.weight", "decoder/decoder_norm/scale", ("norm.weight",), "D"),
    _Row("lm_head.weight", "decoder/logits_dense/kernel", ("head.weight",), "VD"),
)
_BLOCK = (
    _Row(
        "input_layernorm.weight",
        "pre_self_attention_layer_norm/scale",
        ("attention_norm.weight",),
        "D",
    ),
    _Row("self_attn.q_proj.weight", "self_attention/query/kernel", ("attention.q.weight",), "AD"),
    _Row("self_attn.k_proj.weight", "self_attention/key/kernel", ("attention.k.weight",), "KD"),
    _Row("self_attn.v_proj.weight", "self_attention/value/kernel", ("attention.v.weight",), "KD"),
    _Row("self_attn.o_proj.weight", "self_attention/out/kernel", ("attention.out.weight",), "DA"),
)
_DENSE = (
    _Row("post_attention_layernorm.weight", "pre_mlp_layer_norm/scale", ("mlp_norm.weight",), "D"),
    _Row("mlp.gate_proj.weight", "mlp/wi_0/kernel", ("mlp.linear.weight", "mlp.gate.weight"), "FD"),
    _Row("mlp.up_proj.weight", "mlp/wi_1/kernel", ("mlp.up.weight",), "FD"),
    _Row("mlp.down_proj.weight", "mlp/wo/kernel", ("mlp.down.weight",), "DF"),
)
_MOE = (
    _Row("post_attention_layernorm.weight", "pre_mlp_layer_norm/scale", ("moe_norm.weight",), "D"),
    _Row(
        "mlp.gate_weight",
        "mlp/router/router_weights/w/kernel",
        ("moe.router.weight_ED",),
        "ED",
        per_expert="mlp.gate.weight",
    ),
    _Row(
        "pre_extra_mlp_layernorm.weight",
        "pre_extra_mlp_layer_norm/scale",
        ("extra_norm.weight",),
        "D",
    ),
    _Row(
        "extra_mlp.gate_proj.weight",
        "extra_mlp/wi_0/kernel",
        ("extra_mlp.linear.weight", "extra_mlp.gate.weight"),
        "FD",
    ),
    _Row("extra_mlp.up_proj.weight", "extra_mlp/wi_1/kernel", ("extra_mlp.up.weight",), "FD"),
    _Row("extra_mlp.down_proj.weight", "extra_mlp/wo/kernel", ("extra_mlp.down.weight",), "DF"),
)
_EXPERTS = (
    _ExpertRow(
        "mlp.experts.wi_gate",
        "mlp/expert/wi_0/kernel",
        "mlp.experts.{expert}.gate_proj.weight",
        "moe.experts.gates_up",
        (0, 1),
        "HD",
    ),
    _ExpertRow(
        "mlp.experts.wi_up",
        "mlp/expert/wi_1/kernel",
        "mlp.experts.{expert}.up_proj.weight",
        "moe.experts.gates_up",
        (2,),
        "HD",
    ),
    _ExpertRow(
        "mlp.experts.wo",
        "mlp/expert/wo/kernel",
        "mlp.experts.{expert}.down_proj.weight",
        "moe.experts.down",
        None,
        "DH",
    ),
)


class _World(NamedTuple):
    """How one kind of file departs from the table.

    Attributes:
        prefix: What a block's names begin with.
        name: Of a row that every token uses.
        turned: Whether that row's matrix is [in, out].
        expert: Name of a row of experts, which holds ``{expert}`` if each has its own tensor.
    """

    prefix: str
    name: Callable[[_Row], str]
    turned: Callable[[_Row], bool]
    expert: Callable[[_ExpertRow], str]


_WORLDS: Mapping[str, _World] = MappingProxyType(
    {
        "published": _World(
            prefix="model.layers.{i}.",
            name=lambda row: row.published,
            turned=lambda row: False,
            expert=lambda row: row.published,
        ),
        "per-expert": _World(
            prefix="model.layers.{i}.",
            name=lambda row: row.per_expert or row.published,
            turned=lambda row: False,
            expert=lambda row: row.per_expert,
        ),
        "t5x": _World(
            prefix="decoder/layers_{i}/",
            name=lambda row: row.t5x,
            turned=lambda row: row.t5x.endswith("/kernel"),
            expert=lambda row: row.t5x,
        ),
    }
)
KINDS = tuple(_WORLDS)
"""Kinds of files: ``published`` as on the hub, ``per-expert`` with [out, in] matrices of each
expert, ``t5x`` as arrays below ``target`` with kernels [in, out]. Stacked experts are [E, in, out]
in the first and the last."""


def layout(config: DecoderConfig, kind: str = "published") -> Layout:
    """Where each parameter of an OpenMoE decoder lies in files.

    Args:
        config: The model's shape.
        kind: One of ``KINDS``.

    Raises:
        UserError: If the configuration is not OpenMoE's, or there is no such kind.
    """
    _check(config, kind)
    return Layout(_pieces(config, _WORLDS[kind]))


def _pieces(config: DecoderConfig, world: _World) -> Iterator[Piece]:
    lengths = {
        "V": config.vocab_size,
        "D": config.dim,
        "A": config.num_heads * config.head_width,
        "K": config.kv_heads * config.head_width,
        "F": config.dense_hidden or 0,
        "H": config.expert_hidden,
        "E": config.num_experts,
    }
    yield from _rows(_MODEL, "", "", world, lengths)
    for block in range(config.num_layers):
        ours, theirs = f"blocks.{block}.", world.prefix.format(i=block)
        moe = config.is_moe(block)
        yield from _rows(_BLOCK + (_MOE if moe else _DENSE), ours, theirs, world, lengths)
        for row in _EXPERTS if moe else ():
            yield from _experts(row, ours + row.ours, theirs + world.expert(row), lengths)


def _rows(
    rows: tuple[_Row, ...], ours: str, theirs: str, world: _World, lengths: Mapping[str, int]
) -> Iterator[Piece]:
    for row in rows:
        shape = tuple(lengths[letter] for letter in row.shape)
        names = [ours + name for name in row.ours]
        yield from in_a_row(names, shape, theirs + world.name(row), turned=world.turned(row))


def _experts(
    row: _ExpertRow, ours: str, theirs: str, lengths: Mapping[str, int]
) -> Iterator[Piece]:
    shape = (lengths["E"], lengths[row.shape[0]], lengths[row.shape[1]])
    if "{expert}" in theirs:
        return experts_apart(ours, shape, row.parts, theirs)
    return experts_stacked(ours, shape, row.parts, theirs, turned=True)


def _check(config: DecoderConfig, kind: str) -> None:
    if kind not in _WORLDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    wanted = {
        "mlp": "doubly_gated",
        "extra_mlp": True,
        "attention": "gqa",
        "qk_norm": "none",
        "position": "rotary",
        "num_shared_experts": 0,
        "tied_embeddings": False,
    }
    if wrong := unlike(vars(config), wanted):
        raise UserError(
            f"OpenMoE's files have no place for a model with {wrong}; "
            "start from one of the presets openmoe-base, openmoe-8b, openmoe-34b"
        )
