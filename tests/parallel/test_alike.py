"""Ranks that make different meshes, or lay out different models, hear of it at once."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.ddp import ddp
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks
from tests.parallel.user_model import DIM, UserModel

TIMEOUT = 40.0


def told(action: Callable[[], object]) -> str:
    """What a rank is told, and that no rank waited for another in vain."""
    began = time.monotonic()
    try:
        action()
    except UserError as error:
        assert time.monotonic() - began < TIMEOUT / 2
        return str(error)
    return "nothing"


def meshes() -> list[str]:
    mesh = Mesh(timeout=TIMEOUT)
    first = mesh.rank == 0
    half: dict[str, Any] = {"dp": 2} if first else {}
    return [
        told(lambda: Mesh(ep=2 if first else 1, timeout=TIMEOUT)),
        told(lambda: Mesh(ep=3 if first else 1, timeout=TIMEOUT)),
        told(lambda: Mesh(ep=3, timeout=TIMEOUT)),
        told(lambda: Mesh(ep=2, **half, timeout=TIMEOUT)),
    ]


def test_meshes_that_differ_are_named_on_every_rank() -> None:
    zero, one = run_on_ranks(2, meshes)
    assert zero == one
    degrees, mistake_of_one, mistake_of_all, same = zero
    assert degrees.startswith("the ranks made different meshes. mesh: rank 0 says 'pp=1, dp=2,")
    assert "edp=1, ep=2, etp=1" in degrees.partition("rank 1")[0]
    assert "edp=2, ep=1, etp=1" in degrees.partition("rank 1")[2]
    assert "rank 0 says 'ep=3 * etp=1 does not divide" in mistake_of_one
    assert mistake_of_all.startswith("ep=3 * etp=1 does not divide")
    assert same == "nothing"


def models() -> dict[str, str]:
    """What is said of models and arguments of which those of rank 0 are other ones."""
    mesh = Mesh(ep=2, timeout=TIMEOUT)
    first = mesh.rank == 0

    def changed(change: Callable[[UserModel], object]) -> UserModel:
        model = UserModel(("gated",))
        if first:
            change(model)
        return model

    def widened(model: UserModel) -> None:
        model.last = nn.Linear(DIM, DIM + 1, bias=False, dtype=torch.float64)

    plain: dict[str, Any] = {"model": changed(lambda _: None), "mesh": mesh}
    return {
        "shape": told(lambda: parallelize(changed(widened), mesh)),
        "dtype": told(lambda: ddp(changed(lambda m: m.last.float()), mesh)),
        "frozen": told(lambda: ddp(changed(lambda m: m.last.requires_grad_(False)), mesh)),
        "zero": told(lambda: parallelize(**plain, zero=2 if first else 0)),
        "dispatch": told(lambda: parallelize(**plain, dispatch="static" if first else "none")),
        "option": told(lambda: ddp(**plain, find_unused_parameters=first)),
        "values": told(lambda: parallelize(changed(lambda m: nn.init.zeros_(m.last.weight)), mesh)),
    }


def test_models_and_arguments_that_differ_are_named_on_every_rank() -> None:
    zero, one = run_on_ranks(2, models)
    assert zero == one
    assert zero["values"] == "nothing"
    begin = "the ranks gave expertmesh.{} different models or arguments. "
    shape = begin + "last.weight: rank 0 says '(9, 8) float64'; rank 1 says '(8, 8) float64'; build"
    assert zero["shape"].startswith(shape.format("parallelize"))
    dtype = begin + "last.weight: rank 0 says '(8, 8) float32'; rank 1 says '(8, 8) float64'; build"
    assert zero["dtype"].startswith(dtype.format("ddp"))
    assert "last.weight: rank 0 says '(8, 8) float64 without gradient'; rank 1" in zero["frozen"]
    assert "zero=: rank 0 says 2; rank 1 says 0; expert_zero=: rank 0 says 2" in zero["zero"]
    assert "dispatch=: rank 0 says 'static'; rank 1 says 'none'" in zero["dispatch"]
    assert "find_unused_parameters=: rank 0 says True; rank 1 says False" in zero["option"]


def stages() -> tuple[str, str]:
    """Stages of one rank each that are asked for different things, and for the same."""
    config = DecoderConfig(vocab_size=11, dim=8, num_layers=2, num_heads=2, dense_hidden=8)
    mesh = Mesh(pp=2, timeout=TIMEOUT)
    model = keep_stages(DecoderLM(config), Stages.of(config, 2), mesh.coordinates["pp"])
    differing = told(lambda: parallelize(model, mesh, zero=mesh.coordinates["pp"]))
    return differing, told(lambda: parallelize(model, mesh))


def test_stages_may_have_different_models_but_not_be_asked_for_different_things() -> None:
    for differing, alike in run_on_ranks(2, stages):
        assert "zero=: rank 0 says 0; rank 1 says 1" in differing
        assert alike == "nothing"


def alone() -> str:
    if Mesh(timeout=1).rank == 1:
        return ""
    with pytest.raises(RuntimeError) as caught:
        Mesh(timeout=1)
    return str(caught.value)


def test_a_rank_that_does_not_come_is_named() -> None:
    message = run_on_ranks(2, alone)[0]
    assert "rank 1 did not come within 1 s to where rank 0 waits (mesh/1)" in message
