"""The decoder against OpenMoE's formulas: logits, decoding with a cache, padding, position 0."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.convert.openmoe.names import layout
from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from expertmesh.testing import assert_close
from tests.models.test_decoder import GrowingCache
from tests.openmoe.oracle import Sizes, logits, published_shapes, random_checkpoint

SIZES = Sizes(dim=10, hidden=14, layers=4, heads=3, head_dim=6, experts=5, interval=2, vocab=23)
BOS = 0


def config(sizes: Sizes = SIZES, **changes: Any) -> DecoderConfig:
    fields: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "dim": sizes.dim,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "head_dim": sizes.head_dim,
        "attention_scale": 1.0,
        "mlp": "doubly_gated",
        "dense_hidden": sizes.hidden,
        "extra_mlp": True,
        "moe_every": sizes.interval,
        "num_experts": sizes.experts,
        "experts_per_token": 2,
        "expert_hidden": sizes.hidden,
        "router": "openmoe",
    }
    return DecoderConfig(**(fields | changes))


def as_ours(tensors: dict[str, Tensor], sizes: Sizes = SIZES) -> dict[str, Tensor]:
    """The decoder's state from published tensors, by hand."""
    state = {
        "embedding.weight": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "head.weight": tensors["lm_head.weight"],
    }
    for layer in range(sizes.layers):
        own, at = f"blocks.{layer}.", f"model.layers.{layer}."
        moe = (layer + 1) % sizes.interval == 0
        state[own + "attention_norm.weight"] = tensors[at + "input_layernorm.weight"]
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
            projection = tensors[f"{at}self_attn.{theirs}_proj.weight"]
            state[f"{own}attention.{ours}.weight"] = projection
        norm = "moe_norm" if moe else "mlp_norm"
        state[f"{own}{norm}.weight"] = tensors[at + "post_attention_layernorm.weight"]
        dense = "extra_mlp." if moe else "mlp."
        linear, gate = tensors[f"{at}{dense}gate_proj.weight"].chunk(2)
        state[f"{own}{dense}linear.weight"], state[f"{own}{dense}gate.weight"] = linear, gate
        for name in ("up", "down"):
            state[f"{own}{dense}{name}.weight"] = tensors[f"{at}{dense}{name}_proj.weight"]
        if moe:
            state[own + "extra_norm.weight"] = tensors[at + "pre_extra_mlp_layernorm.weight"]
            state[own + "moe.router.weight_ED"] = tensors[at + "mlp.gate_weight"]
            wi_gate = tensors[at + "mlp.experts.wi_gate"].mT.unflatten(1, (2, -1))
            wi_up = tensors[at + "mlp.experts.wi_up"].mT.unsqueeze(1)
            state[own + "moe.experts.gates_up"] = torch.cat([wi_gate, wi_up], dim=1)
            state[own + "moe.experts.down"] = tensors[at + "mlp.experts.wo"].mT
    return state


TENSORS = random_checkpoint(SIZES)


def decoder(**changes: Any) -> DecoderLM:
    model = DecoderLM(config(**changes)).double().eval()
    model.load_state_dict(as_ours(TENSORS))
    return model


def rows(lengths: tuple[int, ...]) -> list[list[int]]:
    """Rows that begin with BOS; ids of later tokens may be the padding's too."""
    generator = torch.Generator().manual_seed(1)
    return [
        [BOS, *torch.randint(SIZES.vocab, (length - 1,), generator=generator).tolist()]
        for length in lengths
    ]


def left_padded(tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask; padding has BOS's id, so the mask cannot be told from the ids."""
    longest = max(map(len, tokens))
    ids = torch.tensor([[BOS] * (longest - len(row)) + row for row in tokens])
    mask = torch.arange(longest) < torch.tensor([[longest - len(row)] for row in tokens])
    return ids, mask


@pytest.mark.parametrize("length", [1, 2, 11])
def test_logits_are_the_formulas(length: int) -> None:
    (row,) = rows((length,))
    assert_close("logits", decoder()(torch.tensor([row]))[0], logits(TENSORS, row, SIZES))


@pytest.mark.parametrize(
    "other",
    [
        {"attention_scale": None},
        {"rope_theta": 5000.0},
        {"router_options": {"renormalize": "chosen"}},
    ],
    ids=str,
)
def test_each_peculiarity_shows_in_the_logits(other: dict[str, Any]) -> None:
    (row,) = rows((9,))
    near = decoder(**other)(torch.tensor([row]))[0] - logits(TENSORS, row, SIZES)
    assert near.abs().max() > 1e-3


def test_left_padding_and_batch_composition_change_nothing() -> None:
    tokens = rows((4, 9, 1, 7))
    ids, mask = left_padded(tokens)
    batch = decoder()(ids, padding_mask=mask)
    for row, out in zip(tokens, batch, strict=True):
        assert_close("row", out[-len(row) :], logits(TENSORS, row, SIZES))


def test_a_capacity_makes_rows_depend_on_each_other() -> None:
    """What dropless is for: the same rows, in the mode of the PyTorch code."""
    tokens = rows((9, 9, 9, 9))
    with pytest.warns(match="lets later tokens take slots"):
        model = decoder(router_options={"capacity": {"factor": 0.5, "eval_factor": 0.5}})
    batch = model(torch.tensor(tokens))
    alone = torch.cat([model(torch.tensor([row])) for row in tokens])
    assert (batch - alone).abs().max() > 1e-3


def test_decoding_with_a_cache_equals_the_formulas_at_every_step() -> None:
    tokens = rows((3, 8, 5))
    ids, mask = left_padded(tokens)
    more = torch.randint(SIZES.vocab, (3, 6), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([ids, more], dim=1)
    mask = torch.cat([mask, torch.zeros_like(more, dtype=torch.bool)], dim=1)
    expected = [
        logits(TENSORS, row + new.tolist(), SIZES) for row, new in zip(tokens, more, strict=True)
    ]
    model, cache = decoder(), GrowingCache()
    done = 0
    for length in (8, 1, 1, 1, 1, 1, 1):
        new = ids[:, done : done + length]
        done += length
        out = model(new, cache=cache, padding_mask=mask[:, :done])
        for row, last, whole in zip(tokens, out[:, -1], expected, strict=True):
            assert_close(f"after {done}", last, whole[len(row) - 1 + done - 8])


def test_position_0_is_seen() -> None:
    """A mask made of ids would hide the beginning of the text, which is id 0 like padding."""
    (row,) = rows((6,))
    ids = torch.tensor([row])
    by_id = decoder()(ids, padding_mask=ids == BOS)[0, -1]
    expected = logits(TENSORS, row, SIZES)[-1]
    assert_close("seen", decoder()(ids)[0, -1], expected)
    assert (by_id - expected).abs().max() > 1e-3
    assert_close("hidden", by_id, logits(TENSORS, row[1:], SIZES)[-1])


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [
        (
            "openmoe-base",
            Sizes(
                dim=768,
                hidden=2048,
                layers=12,
                heads=12,
                head_dim=64,
                experts=16,
                interval=4,
                vocab=256384,
            ),
            799_663_104,
        ),
        (
            "openmoe-8b",
            Sizes(
                dim=2048,
                hidden=8192,
                layers=24,
                heads=24,
                head_dim=128,
                experts=32,
                interval=6,
                vocab=256384,
            ),
            11_855_046_656,
        ),
    ],
)
def test_published_names_and_shapes(name: str, sizes: Sizes, parameters: int) -> None:
    shapes = published_shapes(sizes)
    assert layout(decoder_preset(name)).their_shapes == shapes
    assert sum(map(math.prod, shapes.values())) == parameters
    with torch.device("meta"):
        model = DecoderLM(decoder_preset(name))
        tensors = {tensor: torch.empty(shape) for tensor, shape in shapes.items()}
    ours = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert ours == {k: tuple(v.shape) for k, v in as_ours(tensors, sizes).items()}
