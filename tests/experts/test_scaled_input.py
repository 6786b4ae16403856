import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts import GatedMLPExperts, MLPExperts, ModuleExperts
from expertmesh.experts.scaled_input import ScaledInputExperts
from expertmesh.layer import MoE
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import normal
from expertmesh.routing import TopKRouter
from expertmesh.testing import assert_close, run_on_ranks

DIM, E = 6, 4


def test_output_and_gradients_are_the_definitions() -> None:
    torch.manual_seed(0)
    experts = ScaledInputExperts(GatedMLPExperts(DIM, 5, E, init_std=0.5, seed=0)).double()
    x = torch.randn(7, DIM, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, E + 1, (7, 2))  # sentinels too
    weight = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    y = experts(x, ids, weight)
    inner = experts.experts
    rows = []
    for r in range(7):
        total = torch.zeros(DIM, dtype=torch.float64)
        for k in range(2):
            if ids[r, k] < E:
                gate, up = inner.gate_up[ids[r, k]] @ (weight[r, k] * x[r])
                total = total + inner.down[ids[r, k]] @ (torch.nn.functional.silu(gate) * up)
        rows.append(total)
    expected = torch.stack(rows)
    assert_close("output", y, expected)
    inputs = [x, weight, *experts.parameters()]
    got = torch.autograd.grad(y.square().sum(), inputs)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for one, two in zip(got, wanted, strict=True):
        assert_close("gradient", one, two)


def test_rows_of_no_expert_may_hold_anything() -> None:
    experts = ScaledInputExperts(MLPExperts(DIM, 4, E, seed=0))
    x = torch.full((2, DIM), torch.nan).requires_grad_()
    weight = torch.zeros(2, 1, requires_grad=True)
    y = experts(x, torch.full((2, 1), E), weight)
    assert (y == 0).all()
    y.sum().backward()
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


def test_dtypes_and_no_rows() -> None:
    experts = ScaledInputExperts(MLPExperts(DIM, 4, E, seed=0, dtype=torch.bfloat16))
    x = torch.randn(3, DIM, dtype=torch.bfloat16)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    assert experts(x, ids, torch.ones(3, 1)).dtype == torch.bfloat16
    assert experts(x[:0], ids[:0], torch.ones(0, 1)).shape == (0, DIM)
    experts.reset_parameters(1)
    again = MLPExperts(DIM, 4, E, seed=1, dtype=torch.bfloat16)
    assert torch.equal(experts.experts.up, again.up)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_rows_of_any_number_of_choices(k: int) -> None:
    experts = ScaledInputExperts(MLPExperts(DIM, 4, E, seed=0))
    x = torch.zeros(0, DIM, requires_grad=True)
    y = experts(x, torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k))
    assert y.shape == (0, DIM)
    y.sum().backward()
    assert all((p.grad == 0).all() for p in experts.parameters())


class Scale(nn.Module):
    """Parameter-free: half of the rows, by a buffer or by a number."""

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("factor", torch.tensor(0.5))
        else:
            self.factor = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * self.factor


@pytest.mark.parametrize("buffer", [False, True])
def test_experts_without_parameters(buffer: bool) -> None:
    experts = ScaledInputExperts(ModuleExperts(lambda: Scale(buffer), E, dim=DIM))
    x = torch.randn(3, DIM)
    weight = torch.tensor([[0.5], [2.0], [3.0]])
    y = experts(x, torch.tensor([[0], [E - 1], [E]]), weight)
    assert_close("output", y[:2], (weight * x).relu()[:2] / 2)
    assert (y[2] == 0).all()


def outputs(part: slice = slice(None), mesh: Mesh | None = None) -> torch.Tensor:
    x = normal(3, torch.arange(8 * DIM), torch.float64).view(8, DIM)
    router = TopKRouter(DIM, E, 1, score="sigmoid", init_std=1.0, seed=1)
    experts = ScaledInputExperts(GatedMLPExperts(DIM, 4, E, init_std=0.5, seed=1))
    layer = MoE(router, experts).double()
    if mesh is not None:
        layer = parallelize(layer, mesh)
        assert layer.experts.experts.down.to_local().shape == (E // 2, DIM, 4)
    return layer(x[part]).detach()


def on_ranks() -> torch.Tensor:
    mesh = Mesh(ep=2)
    return outputs(slice(4 * mesh.rank, 4 * mesh.rank + 4), mesh)


def test_two_ranks_do_what_one_does() -> None:
    assert_close("output", torch.cat(run_on_ranks(2, on_ranks)), outputs())
