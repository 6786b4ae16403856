"""The table: published names and shapes, and that it loses nothing either way."""

import dataclasses
import math

import pytest
import torch

from expertmesh.convert.openmoe.names import KINDS, layout
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM, decoder_preset
from expertmesh.parallel.checkpoint.box import Box
from tests.convert.openmoe import by_hand

# (D, all heads, F, E) of the published models.
SIZES = {
    "base": (768, 768, 2048, 16),
    "8b": (2048, 3072, 8192, 32),
    "34b": (3072, 3072, 12288, 32),
}
NUM_LAYERS = {"base": (12, 4), "8b": (24, 6), "34b": (32, 4)}
COUNTS = {"base": 799_663_104, "8b": 11_855_046_656, "34b": 46_270_737_408}


def published_shapes(size: str) -> dict[str, tuple[int, ...]]:
    dim, heads, hidden, experts = SIZES[size]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (256384, dim),
        "model.norm.weight": (dim,),
        "lm_head.weight": (256384, dim),
    }

    def dense(stem: str) -> dict[str, tuple[int, ...]]:
        return {
            f"{stem}.gate_proj.weight": (2 * hidden, dim),
            f"{stem}.up_proj.weight": (hidden, dim),
            f"{stem}.down_proj.weight": (dim, hidden),
        }

    num_layers, interval = NUM_LAYERS[size]
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (heads, dim) for x in "qkv"}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (dim, heads)
        shapes[f"{layer}.input_layernorm.weight"] = (dim,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (dim,)
        if (i + 1) % interval:
            shapes |= dense(f"{layer}.mlp")
            continue
        shapes |= dense(f"{layer}.extra_mlp")
        shapes[f"{layer}.pre_extra_mlp_layernorm.weight"] = (dim,)
        shapes[f"{layer}.mlp.gate_weight"] = (experts, dim)
        shapes[f"{layer}.mlp.experts.wi_gate"] = (experts, dim, 2 * hidden)
        shapes[f"{layer}.mlp.experts.wi_up"] = (experts, dim, hidden)
        shapes[f"{layer}.mlp.experts.wo"] = (experts, hidden, dim)
    return shapes


@pytest.mark.parametrize("size", SIZES)
def test_published_names_and_shapes(size: str) -> None:
    config = decoder_preset(f"openmoe-{size}")
    assert dict(layout(config).their_shapes) == published_shapes(size)


@pytest.mark.parametrize("size", SIZES)
def test_numbers_of_parameters(size: str) -> None:
    config = decoder_preset(f"openmoe-{size}")
    assert config.num_params == COUNTS[size]
    for kind in KINDS:
        assert layout(config, kind).num_elements == COUNTS[size]


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_the_model_has_its_place(size: str) -> None:
    config = decoder_preset(f"openmoe-{size}")
    with torch.device("meta"):
        model = DecoderLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for kind in KINDS:
        assert dict(layout(config, kind).our_shapes) == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_all_of_both_sides_and_do_not_overlap(kind: str) -> None:
    files = layout(by_hand.CONFIG, kind)
    for name, shape in files.our_shapes.items():
        check_partition([piece.box for piece in files.of_ours[name]], shape)
    for name, shape in files.their_shapes.items():
        check_partition([piece.their_box for piece in files.of_theirs[name]], shape)


def check_partition(boxes: list[Box], shape: tuple[int, ...]) -> None:
    assert sum(box.num_elements for box in boxes) == math.prod(shape)
    for number, box in enumerate(boxes):
        assert all(box.overlap(other) is None for other in boxes[:number])


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_is_written_out_by_hand(kind: str) -> None:
    model = by_hand.model()
    state = model.state_dict()
    files = layout(model.config, kind)
    expected = by_hand.BY_KIND[kind](model)
    assert {name: tuple(t.shape) for name, t in expected.items()} == dict(files.their_shapes)
    for name, tensor in expected.items():
        found = torch.full_like(tensor, torch.nan)
        for piece in files.of_theirs[name]:
            whole = Box.whole(files.our_shapes[piece.ours])
            values = piece.as_theirs(state[piece.ours][piece.box.within(whole)])
            found[piece.their_box.within(Box.whole(tuple(tensor.shape)))] = values
        assert torch.equal(found, tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_any_part_of_a_piece_goes_there_and_back(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    files = layout(by_hand.CONFIG, kind)
    for piece in files.pieces:
        start, stop = [], []
        for low, high in zip(piece.box.start, piece.box.stop, strict=True):
            ends = torch.randint(low, high + 1, (2,), generator=generator).sort().values.tolist()
            start.append(min(ends[0], high - 1))
            stop.append(max(ends[1], start[-1] + 1))
        part = Box(tuple(start), tuple(stop))
        there = piece.to_theirs(part)
        assert piece.to_ours(there) == part
        assert there.overlap(piece.their_box) == there
        values = torch.randn(part.shape, generator=generator)
        assert piece.as_theirs(values).shape == there.shape
        assert torch.equal(piece.as_ours(piece.as_theirs(values), part), values)


def test_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"mlp = 'gated' \(expected 'doubly_gated'\)"):
        layout(decoder_preset("nano"))
    odd = dataclasses.replace(by_hand.CONFIG, tied_embeddings=True)
    with pytest.raises(UserError, match=r"no place for .* tied_embeddings = True"):
        layout(odd)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"published, per-expert, t5x, got 'pickle'"):
        layout(by_hand.CONFIG, "pickle")
