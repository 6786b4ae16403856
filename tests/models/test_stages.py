"""Cutting a decoder: the balance of the stages, and that nothing but the rest is gone."""

import itertools
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.models import counts
from expertmesh.models.config import DecoderConfig
from expertmesh.models.decoder import DecoderLM
from expertmesh.models.presets import decoder_preset
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.testing import assert_close


def _config(**overrides: Any) -> DecoderConfig:
    fields: dict[str, Any] = {
        "vocab_size": 32,
        "dim": 16,
        "num_layers": 5,
        "num_heads": 2,
        "dense_hidden": 96,
        "first_dense": 1,
        "num_experts": 4,
        "experts_per_token": 2,
        "expert_hidden": 24,
    }
    return DecoderConfig(**(fields | overrides))


def _sizes(stages: Stages) -> list[int]:
    return [len(blocks) for blocks in stages.blocks]


def _costliest(config: DecoderConfig, sizes: tuple[int, ...]) -> int:
    cost = [counts.block_matrices(config, block) for block in range(config.num_layers)]
    cost[-1] += config.vocab_size * config.dim
    ends = list(itertools.accumulate(sizes))
    return max(sum(cost[end - size : end]) for end, size in zip(ends, sizes, strict=True))


def test_blocks_and_the_output_add_up_to_the_model() -> None:
    config = _config()
    blocks = sum(counts.block_matrices(config, index) for index in range(config.num_layers))
    per_token = 2 * (blocks + config.vocab_size * config.dim)
    attention = config.num_layers * config.num_heads * 2 * config.head_width * (8 + 1)
    assert counts.flops_per_token(config, 8) == per_token + attention


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("vocab_size", [32, 500, 5000])
def test_no_cut_has_a_faster_slowest_stage(num_stages: int, vocab_size: int) -> None:
    config = _config(vocab_size=vocab_size)
    cuts = [
        sizes
        for sizes in itertools.product(range(1, 6), repeat=num_stages)
        if sum(sizes) == config.num_layers
    ]
    best = min(_costliest(config, sizes) for sizes in cuts)
    sizes = _sizes(Stages.of(config, num_stages))
    assert tuple(sizes) in cuts
    assert _costliest(config, tuple(sizes)) == best


def test_later_stages_get_more_where_it_is_as_good() -> None:
    config = _config(num_layers=6, first_dense=0, dense_hidden=None, vocab_size=2)
    assert _sizes(Stages.of(config, 4)) == [1, 2, 2, 1]  # the last one has the output


def test_interleaved_ranks_hold_every_nth_stage() -> None:
    stages = Stages.of(_config(num_layers=8), 2, per_rank=2)
    assert (stages.num_stages, stages.per_rank) == (4, 2)
    assert (stages.of_rank(0), stages.of_rank(1)) == ((0, 2), (1, 3))


def test_stages_by_hand() -> None:
    assert Stages.of(_config(), 2, layers=[4, 1]).blocks == (range(4), range(4, 5))


def test_parts_keep_names_and_values_and_make_the_whole() -> None:
    config = _config(position="learned", max_seq_len=8)
    whole = DecoderLM(config, seed=3)
    stages = Stages.of(config, 2, per_rank=2)
    tokens_BS = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    ranks = []
    for rank in range(2):
        with torch.device("meta"):
            model = keep_stages(DecoderLM(config), stages, rank)
        model.to_empty(device="cpu")
        model.init_weights(3)
        ranks.append(model)
    states = [model.state_dict() for model in ranks]
    assert not states[0].keys() & states[1].keys()
    assert states[0].keys() | states[1].keys() == whole.state_dict().keys()
    for state in states:
        for name, value in state.items():
            assert_close(name, value, whole.state_dict()[name], tol=0.0)
    x = None
    for stage, blocks in enumerate(stages.blocks):
        x = ranks[stage % 2].part(blocks, x, tokens_BS)
    assert_close("logits", x, whole(tokens_BS), tol=0.0)


def test_a_recomputed_pass_finds_its_own_loss_scale() -> None:
    config = _config(router_options={"balance_coef": 1.0}, num_layers=2)
    tokens_BS = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))

    def gradients(checkpoint: bool) -> list[torch.Tensor]:
        model = DecoderLM(config).double()
        if checkpoint:
            model.checkpoint_blocks()
        passes = [model.part(range(2), None, tokens_BS, loss_scale=s) for s in (0.25, 4.0)]
        for logits in passes:
            logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for kept, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert_close("gradient", recomputed, kept)


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({}, {"ranks": 6}, "num_layers=5"),
        ({}, {"ranks": 2, "per_rank": 3}, "at most 5 stages"),
        ({"tied_embeddings": True}, {"ranks": 2}, "tied_embeddings = false"),
        ({}, {"ranks": 2, "layers": [2, 2]}, "add up to num_layers=5"),
        ({}, {"ranks": 2, "layers": [5, 0]}, r"for example \[2, 3\]"),
        ({}, {"ranks": 2, "layers": [5]}, "must be 2 numbers"),
        ({}, {"ranks": 0}, "ranks must be at least 1"),
    ],
)
def test_cuts_that_cannot_be(
    overrides: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Stages.of(_config(**overrides), **arguments)


def test_presets_of_any_size_are_cut_at_once() -> None:
    assert sum(_sizes(Stages.of(decoder_preset("qwen3-30b-a3b"), 8, per_rank=2))) == 48


def test_openmoe_8b_is_cut_as_its_trainer_does_by_hand() -> None:
    """The output layer of 256,384 words weighs as much as several blocks."""
    stages = Stages.of(decoder_preset("openmoe-8b"), 2)
    assert [len(stage) for stage in stages.blocks] == [15, 9]
