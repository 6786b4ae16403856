"""Attention over heads on several ranks equals attention on one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.norm import RMSNorm
from expertmesh.parallel.context import GatheredSlices
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.tensor import (
    ShardedRMSNorm,
    Split,
    shard_attention,
    tensor_parallel_groups,
)
from expertmesh.testing import assert_close, run_on_ranks
from tests.models.conftest import GROUPED, LATENT, SHAPES
from tests.models.test_decoder import GrowingCache
from tests.parallel.sliced import Case, largest_errors

# Even, uneven, with an empty part, padded, recomputed.
CASES = [Case(8), Case(7, padded=True), Case(1), Case(5, padded=True, checkpointed=True)]
MANY_HEADS = {**GROUPED, "num_kv_heads": 4, "qk_norm": "full"}


def check(world: int, degrees: dict[str, Any], *args: Any) -> None:
    for errors in run_on_ranks(world, largest_errors, degrees, *args):
        wrong = {name: error for name, error in errors.items() if not error < 1e-13}
        assert not wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_two_ranks_equal_one(shape: str) -> None:
    check(2, {"tp": 2}, SHAPES[shape], CASES)


@pytest.mark.parametrize("shape", [MANY_HEADS, LATENT], ids=["full-norm", "latent"])
def test_four_ranks_equal_one_with_empty_parts(shape: dict[str, Any]) -> None:
    check(4, {"tp": 4}, shape, [Case(9), Case(3, padded=True), Case(2, checkpointed=True)])


def fully_sharded(
    degrees: dict[str, Any], shape: dict[str, Any], zero: int, checkpointed: bool
) -> float:
    """On a rank: the largest error of a gradient that FSDP summed, to the norm of all."""
    mesh = Mesh(**degrees)
    model, whole = (DecoderLM(DecoderConfig(**shape), seed=1).double().eval() for _ in range(2))
    parallelize(model, mesh, zero=zero)
    if checkpointed:
        model.checkpoint_blocks()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(31, (4, 7), generator=generator)
    weight = torch.randn(4, 7, 31, generator=generator, dtype=torch.float64)
    (whole(tokens) * weight).sum().backward()
    slices = GatheredSlices(mesh.group("cp"), 7)
    tokens, weight = (x.chunk(mesh.degree("dp"))[mesh.coordinates["dp"]] for x in (tokens, weight))
    logits = model(slices.own_part(tokens, 1), cache=slices)
    (logits * model.own_part(slices.own_part(weight, 1), 1)).sum().backward()
    expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    scale = torch.stack([grad.norm() for grad in expected.values()]).norm()
    errors = []
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), name
        errors.append((parameter.grad.full_tensor() - expected[name]).norm() / scale)
    assert len(errors) == len(expected)
    return torch.stack(errors).max().item()


@pytest.mark.parametrize(
    ("shape", "zero", "other"),
    [
        ("head-norm", 0, "dp"),
        ("head-norm", 2, "cp"),
        ("full-norm", 2, "dp"),
        ("full-norm", 3, "cp"),
        ("latent", 3, "dp"),
        ("latent", 0, "cp"),
    ],
)
def test_gradients_come_together_under_fsdp(shape: str, zero: int, other: str) -> None:
    arguments = {"tp": 2, other: 2}, SHAPES[shape], zero, zero == 3
    assert max(run_on_ranks(4, fully_sharded, *arguments)) < 1e-13


def test_noise_follows_the_tokens() -> None:
    options = {"capacity": None, "balance_coef": 0}
    shape = {**GROUPED, "router": "switch", "experts_per_token": 1, "router_options": options}
    check(2, {"tp": 2}, shape, [Case(7)], True)


def built_on_meta() -> tuple[list[str], list[tuple[str, Any, Any]]]:
    """On a rank: the weights of a model that was divided before it had any."""
    mesh = Mesh(tp=2)
    with torch.device("meta"):
        model = DecoderLM(DecoderConfig(**MANY_HEADS))
    shard_attention(model, mesh)
    model.to_empty(device="cpu")
    model.init_weights(3)
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.state_dict().items()
    }
    placed = [
        (name, p.placements[0], p.to_local().shape)
        for name, p in model.named_parameters()
        if isinstance(p, DTensor)
    ]
    whole = DecoderLM(DecoderConfig(**MANY_HEADS), seed=3).state_dict()
    assert list(weights) == list(whole)
    return [name for name in whole if not torch.equal(weights[name], whole[name])], placed


def test_weights_made_in_place_equal_the_whole_models() -> None:
    for wrong, placed in run_on_ranks(2, built_on_meta):
        assert wrong == []
        of_block_0 = {
            name.removeprefix("blocks.0.attention."): rest
            for name, *rest in placed
            if name.startswith("blocks.0.")
        }
        assert of_block_0 == {
            "q.weight": [Shard(0), (8, 16)],
            "k.weight": [Shard(0), (8, 16)],
            "v.weight": [Shard(0), (8, 16)],
            "out.weight": [Shard(1), (16, 8)],
            "q_norm.weight": [Shard(0), (8,)],
            "k_norm.weight": [Shard(0), (8,)],
        }


def groups_of(shape: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """On a rank: names of what ``tensor_parallel_groups`` returns."""
    model = DecoderLM(DecoderConfig(**shape))
    assert tensor_parallel_groups(model) == []
    shard_attention(model, Mesh(tp=2))
    names = {module: name for name, module in model.named_modules()}
    return [
        (names[group.attention], [names[module] for module in group.whole])
        for group in tensor_parallel_groups(model)
    ]


def test_groups_tell_divided_weights_from_whole_ones() -> None:
    head, full, latent = (
        run_on_ranks(2, groups_of, shape)[0]
        for shape in (SHAPES["head-norm"], SHAPES["full-norm"], LATENT)
    )
    attention = "blocks.0.attention"
    assert len(head) == 3
    assert head[0] == (attention, [f"{attention}.q_norm", f"{attention}.k_norm"])
    assert full[0] == (attention, [])
    inner = ("q.0", "q.1", "kv_down", "kv_norm")
    assert latent[0] == (attention, [f"{attention}.{name}" for name in inner])


def decoded() -> tuple[Tensor, Tensor]:
    """On a rank: logits of single new positions after cached ones, which one rank computes."""
    model, whole = (DecoderLM(DecoderConfig(**GROUPED), seed=1).double().eval() for _ in range(2))
    shard_attention(model, Mesh(tp=2))
    tokens = torch.randint(31, (2, 6), generator=torch.Generator().manual_seed(0))
    cache = GrowingCache()
    parts = [model(part, cache=cache) for part in tokens.split([4, 1, 1], dim=1)]
    assert cache.layers[0][0].shape == (2, 1, 6, 4)
    return torch.cat(parts[1:], dim=1).detach(), whole(tokens)[:, 4:].detach()


def test_a_cache_holds_the_own_heads() -> None:
    (first, expected), (second, _) = run_on_ranks(2, decoded)
    assert_close("logits", first, expected)
    assert second.shape == (2, 0, 31)


def bytes_of_attention() -> dict[str, int]:
    """On a rank: bytes sent by one forward and backward pass."""
    mesh = Mesh(tp=2)
    model = DecoderLM(DecoderConfig(**GROUPED)).double().eval()
    shard_attention(model, mesh)
    model(torch.zeros(3, 8, dtype=torch.int64)).sum().backward()
    return dict(mesh.group("tp").traffic.bytes_sent)


def test_bytes_are_those_of_one_gather_and_one_scatter_each_way() -> None:
    blocks, batch, own_positions, width = 3, 3, 4, 16
    each = blocks * batch * own_positions * width * 8
    for sent in run_on_ranks(2, bytes_of_attention):
        assert sent == {"all_gather": 2 * each, "reduce_scatter": 2 * each}


def norms(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """On a rank: one norm over two ranks' parts, and this part of the whole norm."""
    generator = torch.Generator().manual_seed(0)
    whole = RMSNorm(12, 1e-6)
    nn.init.normal_(whole.weight, generator=generator)
    x = (50 * torch.randn(5, 12, generator=generator)).to(dtype)
    mesh = Mesh(tp=2)
    group = mesh.group("tp")
    norm = ShardedRMSNorm(whole, Split(group, mesh.attention["tp"]))
    own, expected = (tensor.chunk(2, -1)[group.index] for tensor in (x, whole(x)))
    return norm(own).detach(), expected.detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_norm_over_parts(dtype: torch.dtype) -> None:
    for actual, expected in run_on_ranks(2, norms, dtype):
        assert_close("normed", actual, expected, 1e-2 if dtype == torch.bfloat16 else 1e-6)


class FourWay:
    """The least of a mesh that a refusal needs."""

    def group(self, _: str) -> Any:
        class Four:
            size = 4

        return Four()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {**GROUPED, "num_heads": 8},
            r"tp must divide num_heads=8 and num_kv_heads=2, got tp=4; set tp to one of \[1, 2\]",
        ),
        (
            {**LATENT, "num_heads": 6},
            r"tp must divide num_heads=6, got tp=4; set tp to one of \[1, 2, 3, 6\]",
        ),
    ],
    ids=["grouped", "latent"],
)
def test_heads_that_cannot_be_dealt_out_are_refused(shape: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = DecoderLM(DecoderConfig(**shape))
    with pytest.raises(UserError, match=message):
        shard_attention(model, FourWay())  # type: ignore[arg-type]  # a stand-in
    assert not tensor_parallel_groups(model)


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="got tp=4 and a Linear; set tp=1"):
        shard_attention(nn.Linear(2, 2), FourWay())  # type: ignore[arg-type]  # a stand-in


def test_one_rank_changes_nothing() -> None:
    model = DecoderLM(DecoderConfig(**GROUPED))
    before = repr(model)
    shard_attention(model, Mesh())
    assert repr(model) == before
