import pytest
import torch

from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.models.mlp import GatedMLP
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import normal
from expertmesh.residual_moe import GatedShared, ResidualMoE
from expertmesh.routing import LoadBalancingLoss, TopKRouter
from expertmesh.testing import assert_close, run_on_ranks

DIM = 6


def experts():
    return GatedMLPExperts(DIM, 4, 2, init_std=0.5, seed=1)


def routed(**options):
    return MoE(TopKRouter(DIM, 2, 1, init_std=1.0, seed=1, **options), experts())


def mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GatedMLP(DIM, 5)


def test_branches_are_mixed_by_a_softmax():
    layer = ResidualMoE(routed(), mlp(), seed=2).double()
    with torch.no_grad():
        layer.bias_2.copy_(torch.tensor([0.3, -0.4]))
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    coefficient = torch.softmax(x @ layer.coefficient_2D.T + layer.bias_2, dim=-1)
    expected = layer.moe(x) * coefficient[..., 0:1] + layer.mlp(x) * coefficient[..., 1:2]
    assert_close("output", y, expected)
    inputs = [x, *layer.parameters()]
    cotangent = torch.randn_like(x)
    got = torch.autograd.grad((y * cotangent).sum(), inputs)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for one, two in zip(got, wanted, strict=True):
        assert_close("gradient", one, two)


def test_the_plain_sum_is_a_shared_module():
    shared = mlp()
    x = torch.randn(7, DIM)
    both = MoE(routed().router, experts(), shared=shared)
    assert_close("sum", both(x), routed()(x) + shared(x), 1e-6)


def test_arguments_pass_through():
    layer = ResidualMoE(routed(losses=(LoadBalancingLoss(coef=1.0),)), mlp(), seed=2)
    x = torch.randn(3, 4, DIM)
    y, routing = layer(x, return_routing=True)
    assert_close("replay", layer(x, routing=routing), y)
    y.sum().backward()
    assert layer.moe.router.weight_ED.grad.abs().sum() > 0
    mask = torch.ones(3, 4, dtype=torch.bool)
    coefficient = torch.softmax(x @ layer.coefficient_2D.T, dim=-1)
    alone = layer(x, padding_mask=mask)
    assert_close("padding", alone, coefficient[..., 1:] * layer.mlp(x), 1e-6)
    assert layer(x[:0]).shape == (0, 4, DIM)


def test_initial_coefficients_follow_the_seed():
    one, two = ResidualMoE(routed(), mlp(), seed=2), ResidualMoE(routed(), mlp(), seed=3)
    assert not torch.equal(one.coefficient_2D, two.coefficient_2D)
    for layer in (one, two):
        layer.reset_parameters(4)
    assert torch.equal(one.coefficient_2D, two.coefficient_2D)
    assert torch.equal(one.moe.experts.down, two.moe.experts.down)


def test_gated_shared_by_the_definition():
    shared = GatedShared(mlp(), DIM, init_std=1.0, seed=0)
    x = torch.randn(5, DIM)
    with_gate = MoE(routed().router, experts(), shared=shared)
    expected = routed()(x) + torch.sigmoid(x @ shared.weight_1D[0])[:, None] * shared.module(x)
    assert_close("output", with_gate(x), expected, 1e-6)
    with_gate(x).sum().backward()
    assert shared.weight_1D.grad.abs().sum() > 0
    half = shared.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    again = GatedShared(mlp(), DIM, seed=1)
    again.reset_parameters(0)
    expected = GatedShared(mlp(), DIM, init_std=1.0, seed=0).weight_1D
    assert_close("seed", again.weight_1D * 50, expected, 1e-6)


def outputs(part=slice(None), mesh=None):
    x = normal(3, torch.arange(8 * DIM), torch.float64).view(8, DIM)
    moe = MoE(routed().router, experts(), shared=GatedShared(mlp(), DIM, seed=3))
    layer = ResidualMoE(moe, mlp(), seed=2).double()
    if mesh is not None:
        layer = parallelize(layer, mesh, zero=0)
    y = layer(x[part])
    y.square().sum().backward()
    grad = layer.coefficient_2D.grad
    return y.detach(), grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def on_ranks():
    mesh = Mesh(ep=2)
    return outputs(slice(4 * mesh.rank, 4 * mesh.rank + 4), mesh)


def test_two_ranks_do_what_one_does():
    y, grad = outputs()
    views = run_on_ranks(2, on_ranks)
    assert_close("output", torch.cat([view[0] for view in views]), y)
    for view in views:
        assert_close("gradient", view[1], grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_kept_under_autocast(dtype):
    layer = ResidualMoE(routed(), mlp(), seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(3, DIM)).dtype == torch.float32
    assert layer.to(dtype)(torch.randn(3, DIM, dtype=dtype)).dtype == dtype
