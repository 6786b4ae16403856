"""The global norm against that of whole gradients, whoever holds which part."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from expertmesh.models import DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.clip import clip_grad_norm_, grad_norm
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import Shard, global_index, shard_of
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble
from tests.parallel.test_experts import CONFIG
from tests.parallel.user_model import UserModel, gradient_pieces


def invent_gradients(model: nn.Module) -> None:
    """A gradient whose elements depend on their index in the whole; some parameters have none."""
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        param.grad = param.detach().clone()
        shard = shard_of(param.grad)
        for row in range(len(shard.local)):
            index = global_index(shard, row, row + 1)[0]
            shard.local[row] = torch.sin(index.double() + len(name)).to(shard.local.dtype)


def kinds(degrees: dict[str, Any]) -> tuple[str, ...]:
    """Families of experts that can be laid out so."""
    return ("gated",) if "etp" in degrees else ("gated", "module")


def clipped(
    kind: str, degrees: dict[str, Any], stages: list[int], max_norm: float
) -> list[tuple[float, dict[str, Shard]]]:
    """By ZeRO stage."""
    mesh = Mesh(**degrees)
    return [_clipped(kind, degrees, mesh, zero, max_norm) for zero in stages]


def _clipped(
    kind: str, degrees: dict[str, Any], mesh: Mesh, zero: int, max_norm: float
) -> tuple[float, dict[str, Shard]]:
    model: nn.Module = UserModel(kinds(degrees))
    if kind == "decoder":
        model = DecoderLM(CONFIG).double()
        if mesh.degree("pp") > 1:
            keep_stages(model, Stages.of(CONFIG, mesh.degree("pp")), mesh.coordinates["pp"])
    parallelize(model, mesh, zero=zero)
    invent_gradients(model)
    norm = clip_grad_norm_(model, max_norm, mesh)
    assert norm.dtype == torch.float64
    return float(norm), gradient_pieces(model)


def check(kind: str, degrees: dict[str, Any], stages: list[int]) -> None:
    max_norm = 2.5
    reference = DecoderLM(CONFIG).double() if kind == "decoder" else UserModel(kinds(degrees))
    invent_gradients(reference)
    expected = float(nn.utils.clip_grad_norm_(list(reference.parameters()), max_norm))
    whole = assemble([gradient_pieces(reference)])
    by_rank = run_on_ranks(4, clipped, kind, degrees, stages, max_norm)
    for views in zip(*by_rank, strict=True):
        assert [norm for norm, _ in views] == pytest.approx([expected] * 4, rel=1e-13)
        got = assemble([gradients for _, gradients in views])
        assert got.keys() == whole.keys()
        for name, gradient in whole.items():
            assert_close(name, got[name], gradient)


@pytest.mark.parametrize(
    "degrees",
    [{"edp": 4}, {"ep": 4}, {"ep": 2, "placement": "outside"}, {"ep": 2, "etp": 2}, {"etp": 2}],
    ids=str,
)
def test_copies_and_pieces_count_once(degrees: dict[str, Any]) -> None:
    check("user", degrees, [0, 2])


@pytest.mark.parametrize(
    ("degrees", "zero"),
    [
        ({"tp": 2, "ep": 2}, 0),
        ({"tp": 2, "cp": 2, "ep": 2, "etp": 2}, 3),
        ({"pp": 2, "ep": 2}, 1),
        ({"pp": 2, "tp": 2, "etp": 2}, 0),
    ],
    ids=str,
)
def test_divided_attention_and_stages_count_once(degrees: dict[str, Any], zero: int) -> None:
    check("decoder", degrees, [zero])


def bounds_and_dtypes() -> dict[str, Any]:
    mesh = Mesh(ep=2)
    model = parallelize(UserModel(("gated",)), mesh)
    found: dict[str, Any] = {}
    invent_gradients(model)
    before = copy.deepcopy(gradient_pieces(model))
    found["measured"] = float(clip_grad_norm_(model, math.inf, mesh))
    found["within"] = float(clip_grad_norm_(model, 1e6, mesh))
    after = gradient_pieces(model)
    found["unchanged"] = all(torch.equal(before[n].local, after[n].local) for n in before)
    clip_grad_norm_(model, 0.0, mesh)
    found["zero"] = max(float(g.local.abs().max()) for g in gradient_pieces(model).values())
    found["none"] = float(grad_norm([], mesh))

    narrow = parallelize(UserModel(("gated",)).bfloat16(), mesh)
    invent_gradients(narrow)
    found["bfloat16"] = clip_grad_norm_(narrow, 1.0, mesh)
    found["bfloat16 clipped"] = clip_grad_norm_(narrow, 1.0, mesh)
    return found


def test_bounds_and_narrow_gradients() -> None:
    reference = UserModel(("gated",))
    invent_gradients(reference)
    squares = [p.grad.square().sum() for p in reference.parameters() if p.grad is not None]
    expected = float(torch.stack(squares).sum().sqrt())
    for found in run_on_ranks(4, bounds_and_dtypes):
        assert found["measured"] == found["within"] == pytest.approx(expected, rel=1e-13)
        assert found["unchanged"]
        assert found["zero"] == 0.0
        assert found["none"] == 0.0
        # Squares of bfloat16 gradients are added in float32.
        assert found["bfloat16"].dtype == torch.float32
        assert float(found["bfloat16"]) == pytest.approx(expected, rel=2e-3)
        assert float(found["bfloat16 clipped"]) == pytest.approx(1.0, rel=1e-2)


def test_one_process_clips_as_torch_does() -> None:
    ours, theirs = UserModel(), UserModel()
    for model in (ours, theirs):
        invent_gradients(model)
    norm = clip_grad_norm_(ours, 1.5, Mesh())
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 1.5))
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
