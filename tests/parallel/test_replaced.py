"""Optimizers made before a model is laid out, and those made after."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from expertmesh.errors import UserError
from expertmesh.parallel.ddp import ddp
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks
from tests.parallel.user_model import DIM, moe_of

PLACERS: dict[str, Callable[[nn.Module, Mesh], nn.Module]] = {
    "ddp": ddp,
    "parallelize": parallelize,
}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, DIM, dtype=torch.float64), moe_of())


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """What the optimizer says to a step."""
    model(torch.ones(3, DIM, dtype=torch.float64)).sum().backward()
    try:
        optimizer.step()
    except UserError as error:
        return str(error)
    return "stepped"


def placed(placer: str, degrees: dict[str, Any]) -> list[str]:
    mesh, model = Mesh(**degrees), net()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    said = [step(model, early)]
    model = PLACERS[placer](model, mesh)
    late = torch.optim.SGD(model.parameters(), lr=0.1)
    said += [step(model, late), step(model, early)]
    other = net()
    said.append(step(other, torch.optim.SGD(other.parameters(), lr=0.1)))
    return said


@pytest.mark.parametrize(("placer", "replaced"), [("ddp", 4), ("parallelize", 7)])
def test_an_optimizer_made_before_is_refused_at_its_first_step(placer: str, replaced: int) -> None:
    for before, late, early, other in run_on_ranks(2, placed, placer, {"ep": 2}):
        assert (before, late, other) == ("stepped",) * 3
        assert early.startswith(f"{replaced} of the 7 parameters that SGD was given are no longer")
        assert f"expertmesh.{placer} has put" in early
        assert "make the optimizer after that call" in early


def nothing_replaced() -> list[str]:
    return placed("ddp", {"edp": 2})


def test_what_is_left_in_place_may_have_an_optimizer_already() -> None:
    """DDP over copies of the experts leaves every parameter where it is."""
    assert run_on_ranks(2, nothing_replaced) == [["stepped"] * 4] * 2


def left_alive() -> tuple[int, int]:
    """Old parameters alive after a call, and hooks of all optimizers, if nobody holds them."""
    model = net()
    old: list[Any] = [weakref.ref(param) for param in model.parameters()]
    parallelize(model, Mesh(ep=2))
    gc.collect()
    return sum(ref() is not None for ref in old), len(_global_optimizer_pre_hooks)


def test_old_parameters_are_not_kept() -> None:
    assert run_on_ranks(2, left_alive) == [(0, 0)] * 2
