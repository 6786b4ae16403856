"""Adafactor against torch's and the paper's formula, and on meshes against one process."""

from typing import Any

import pytest
import torch
from torch import nn

from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Pipeline
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.optimizers import adafactor
from expertmesh.train.optimizers.adafactor import Adafactor
from expertmesh.train.passes import OneByOne, Passes, ThroughPipeline
from expertmesh.train.precision import Precision
from expertmesh.train.step import Stepper
from tests.train.test_step import make_batch
from tests.train.tiny import MODEL

CPU = torch.device("cpu")
CONFIG = OptimConfig(name="adafactor", lr=1e-2, weight_decay=0.1)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    shapes = ((5, 7), (3, 2, 6, 4), (9,), (1, 4))
    return [nn.Parameter(torch.randn(shape, dtype=dtype) * 0.3) for shape in shapes]


def step(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    for param in params:
        param.grad = torch.randn(param.shape).to(param.dtype) * 10 ** (number % 3)
    optimizer.step()


def test_it_is_torchs_while_the_rate_is_below_one_over_the_root_of_the_step() -> None:
    ours, theirs = parameters(), parameters()
    own = Adafactor([{"params": ours, "weight_decay": 0.1}], lr=1e-2, decay=0.8)
    other = torch.optim.Adafactor(theirs, lr=1e-2, beta2_decay=-0.8, weight_decay=0.1, d=1.0)
    for number in range(1, 8):
        step(ours, own, number)
        step(theirs, other, number)
    for one, two in zip(ours, theirs, strict=True):
        assert_close("parameter", one.detach(), two.detach(), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str
)
def test_two_steps_by_the_papers_formula_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    (param, *_) = parameters(dtype)
    value = param.detach().double()
    beside = nn.Parameter(torch.ones(3))  # of another width, in the same sums over ranks
    optimizer = Adafactor([{"params": [param, beside]}], lr=0.5, decay=0.8)
    rows, columns = torch.zeros(5, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for t in (1, 2):
        step([param, beside], optimizer, t)
        assert param.grad is not None
        grad = param.grad.double()
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (grad**2 + 1e-30).mean(1)
        columns = beta * columns + (1 - beta) * (grad**2 + 1e-30).mean(0)
        update = grad / (rows[:, None] * columns[None] / rows.mean()).sqrt()
        update /= max(1.0, float(update.square().mean().sqrt()))
        value -= 0.5 * max(1e-3, float(value.square().mean().sqrt())) * update
    assert_close("parameter", param.detach().double(), value, tolerance)


@pytest.mark.parametrize("at_once", [1, 5, 8, 24, 1000])
def test_parts_are_the_whole(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = parameters(), parameters()
    optimizers = [Adafactor([{"params": p, "weight_decay": 0.1}], lr=1e-2) for p in (whole, cut)]
    for number in (1, 2, 3):
        step(whole, optimizers[0], number)
        with monkeypatch.context() as patched:
            patched.setitem(adafactor._AT_ONCE, "cpu", at_once)
            step(cut, optimizers[1], number)
    for one, other in zip(whole, cut, strict=True):
        assert_close("parameter", other.detach(), one.detach(), 1e-6)


def test_an_expert_without_tokens_stays_where_it_is() -> None:
    param = nn.Parameter(torch.randn(2, 3, 4))
    before = param.detach().clone()
    optimizer = Adafactor([{"params": [param]}], lr=1e-2)
    for _ in range(3):
        param.grad = torch.zeros(2, 3, 4)
        param.grad[0] = 1.0
        optimizer.step()
    assert torch.equal(param[1], before[1])
    assert not torch.equal(param[0], before[0])
    assert bool(param.isfinite().all())


def test_a_parameter_without_gradient_has_no_state() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Adafactor([{"params": [used, unused]}], lr=1e-2)
    optimizer.step()
    used.grad = torch.ones(2)
    optimizer.step()
    assert set(optimizer.state) == {used}


def test_the_state_is_as_long_as_rows_and_columns() -> None:
    params = parameters(torch.bfloat16)
    optimizer = Adafactor([{"params": params}], lr=1e-2)
    step(params, optimizer, 1)
    shapes = [
        {key: tuple(value.shape) for key, value in optimizer.state[p].items()} for p in params
    ]
    assert shapes[0] == {"step": (), "rows": (5,), "columns": (7,)}
    assert shapes[1] == {"step": (), "rows": (3, 2, 6), "columns": (3, 2, 4)}
    assert shapes[2] == {"step": (), "square": (9,)}
    assert {v.dtype for p in params for v in optimizer.state[p].values()} == {torch.float32}


def stepped(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range
) -> list[torch.Tensor]:
    for number in numbers:
        step(params, optimizer, number)
    return [param.detach().clone() for param in params]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_state_that_was_saved_goes_on_in_its_own_width(dtype: torch.dtype) -> None:
    whole, halves = parameters(dtype), parameters(dtype)
    expected = stepped(whole, Adafactor([{"params": whole}], lr=1e-2), range(1, 6))
    first, second = (Adafactor([{"params": halves}], lr=1e-2) for _ in range(2))
    stepped(halves, first, range(1, 4))
    second.load_state_dict(first.state_dict())
    for one, other in zip(expected, stepped(halves, second, range(4, 6)), strict=True):
        assert torch.equal(one, other)


def passes_of(degrees: dict[str, Any], zero: int) -> Passes:
    config = DecoderConfig(**MODEL | {"num_layers": 4})
    mesh = Mesh(**degrees)
    model = DecoderLM(config, seed=5)
    common: dict[str, Any] = {"precision": Precision("fp32"), "device": CPU, "sequences": 2}
    if mesh.world == 1:
        return OneByOne(model, **common)
    common["mesh"] = mesh
    if mesh.degree("pp") == 1:
        return OneByOne(parallelize(model, mesh, zero=zero), **common)
    stages = Stages.of(config, mesh.degree("pp"))
    keep_stages(model, stages, mesh.coordinates["pp"])
    parallelize(model, mesh, zero=zero)
    return ThroughPipeline(model, pipeline=Pipeline(model, stages, mesh.group("pp")), **common)


def trained(degrees: dict[str, Any], zero: int = 2) -> tuple[list[float], Any]:
    passes = passes_of(degrees, zero)
    optimizer = build_optimizer(passes.model, CONFIG, passes.mesh)
    stepper = Stepper(passes, optimizer, seed=1, clip=1.0)
    losses = [stepper.step(number, make_batch(4, 7)).loss for number in range(1, 4)]
    return losses, pieces(passes.model.named_parameters())


@pytest.mark.parametrize(
    ("degrees", "zero"),
    [({"ep": 2}, 2), ({"tp": 2, "ep": 2, "etp": 2}, 3), ({"pp": 2, "ep": 2}, 1), ({"ep": 4}, 0)],
    ids=str,
)
def test_every_mesh_takes_the_steps_of_one_process(degrees: dict[str, Any], zero: int) -> None:
    losses, own = trained({})
    views = run_on_ranks(4, trained, degrees, zero)
    got, whole = assemble([view[1] for view in views]), assemble([own])
    for view in views:
        assert view[0] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    assert got.keys() == whole.keys()
    for name, value in whole.items():
        assert_close(name, got[name], value, 1e-4)
