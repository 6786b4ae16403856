"""Sequences in slices on several ranks equal sequences on one."""

from typing import Any

import pytest
import torch

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.context import GatheredSlices
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.tensor import shard_attention
from expertmesh.testing import run_on_ranks
from tests.models.conftest import GROUPED, LATENT, SHAPES
from tests.parallel.sliced import Case, largest_errors

# Even, uneven, with an empty slice, padded, recomputed.
CASES = [Case(8), Case(7, padded=True), Case(1), Case(5, padded=True, checkpointed=True)]


def check(world: int, degrees: dict[str, Any], *args: Any) -> None:
    for errors in run_on_ranks(world, largest_errors, degrees, *args):
        wrong = {name: error for name, error in errors.items() if not error < 1e-13}
        assert not wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_two_slices_equal_one(shape: str) -> None:
    check(2, {"cp": 2}, SHAPES[shape], CASES)


@pytest.mark.parametrize("shape", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_four_slices_equal_one_with_empty_ones(shape: dict[str, Any]) -> None:
    cases = [Case(9, checkpointed=True), Case(3, padded=True), Case(1, padded=True)]
    check(4, {"cp": 4}, shape, cases)


@pytest.mark.parametrize("shape", ["grouped", "full-norm", "learned", "latent"])
def test_slices_of_divided_attention_equal_the_whole(shape: str) -> None:
    cases = [Case(11), Case(7, padded=True), Case(2), Case(3, padded=True, checkpointed=True)]
    check(4, {"cp": 2, "tp": 2}, SHAPES[shape], cases)


def test_noise_follows_the_tokens() -> None:
    options = {"capacity": None, "balance_coef": 0}
    shape = {**GROUPED, "router": "switch", "experts_per_token": 1, "router_options": options}
    check(4, {"cp": 2, "tp": 2}, shape, [Case(9)], True)


def bytes_of_attention() -> dict[str, int]:
    """On a rank: bytes sent over ``cp`` by one forward and backward pass."""
    mesh = Mesh(cp=2, tp=2)
    model = DecoderLM(DecoderConfig(**GROUPED)).double().eval()
    shard_attention(model, mesh)
    slices = GatheredSlices(mesh.group("cp"), 8)
    tokens = slices.own_part(torch.zeros(3, 8, dtype=torch.int64), 1)
    model(tokens, cache=slices).sum().backward()
    return dict(mesh.group("cp").traffic.bytes_sent)


def test_bytes_are_those_of_the_own_heads_keys_and_values() -> None:
    blocks, batch, own_positions, own_heads, width = 3, 3, 4, 1, 4
    each = blocks * batch * own_positions * own_heads * 2 * width * 8
    for sent in run_on_ranks(4, bytes_of_attention):
        assert sent == {"all_gather": each, "reduce_scatter": each}


def test_whole_sequences_are_refused() -> None:
    model = DecoderLM(DecoderConfig(**GROUPED))
    slices = GatheredSlices(Group((0, 1), 1, None), 7)
    with pytest.raises(UserError, match="tokens must be this rank's slice of 3 positions, got 7"):
        model(torch.zeros(1, 7, dtype=torch.int64), cache=slices)


def test_a_group_of_one_has_the_whole_sequence() -> None:
    model = DecoderLM(DecoderConfig(**GROUPED)).double()
    slices = GatheredSlices(Group.alone(), 7)
    tokens = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(slices.own_part(tokens, 1), cache=slices), model(tokens))
