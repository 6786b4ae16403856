import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.experts import GatedMLPExperts, MLPExperts
from expertmesh.layer import moe_layers
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import normal
from expertmesh.soft_moe import SoftMoE
from expertmesh.testing import assert_close, run_on_ranks

DIM = 6


def make(num_experts=3, slots=2, seed=0, scale=4.0):
    experts = GatedMLPExperts(DIM, 5, num_experts, init_std=0.5, seed=seed)
    layer = SoftMoE(experts, slots, seed=seed).double()
    with torch.no_grad():
        layer.scale_1.fill_(scale)
    return layer


def plain(layer, x_SD):
    """One sequence by the paper's formulas, slot by slot."""
    phi = layer.phi_DS / (layer.phi_DS.square().sum(0, keepdim=True) + 1e-6).sqrt()
    rows = x_SD / (x_SD.square().sum(1, keepdim=True) + 1e-6).sqrt()
    logits = layer.scale_1 * rows @ phi
    y = torch.zeros_like(x_SD)
    combine = logits.exp() / logits.exp().sum(1, keepdim=True)
    experts = layer.moe.experts
    for slot in range(layer.num_slots):
        mix = logits[:, slot].exp() / logits[:, slot].exp().sum()
        e = slot // layer.slots_per_expert
        slot_D = mix @ x_SD
        gate, up = experts.gate_up[e] @ slot_D
        out_D = experts.down[e] @ (torch.nn.functional.silu(gate) * up)
        y = y + combine[:, slot : slot + 1] * out_D
    return y


@pytest.mark.parametrize(("batch", "length", "slots"), [(2, 5, 2), (1, 1, 3), (3, 7, 1)])
def test_output_and_gradients_are_the_definitions(batch, length, slots):
    torch.manual_seed(0)
    layer = make(slots=slots)
    x = torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    expected = torch.stack([plain(layer, sequence) for sequence in x])
    assert_close("output", y, expected)
    got = torch.autograd.grad((y * cotangent).sum(), inputs)
    wanted = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for (name, _), one, two in zip([("x", x), *layer.named_parameters()], got, wanted, strict=True):
        assert_close(name, one, two)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from([1.0, 1e4]), st.integers(0, 9))
def test_mixtures_sum_to_one(length, slots, size, seed):
    layer = make(slots=slots, seed=seed)
    x = size * normal(seed, torch.arange(2 * length * DIM), torch.float64).view(2, length, DIM)
    mask = torch.zeros(2, length, 1, dtype=torch.bool)
    mask[1, 0] = True
    dispatch, combine = layer._mixtures(x, mask)
    ones = torch.ones_like(dispatch[:, 0])
    ones[1] *= length > 1
    torch.testing.assert_close(dispatch.sum(1), ones)
    torch.testing.assert_close(combine.sum(2), (~mask[..., 0]).double())


def test_padding_plays_no_part():
    torch.manual_seed(1)
    layer = make()
    x = torch.randn(3, 5, DIM, dtype=torch.float64)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 2:] = True
    mask[2] = True
    x[mask] = torch.nan
    y = layer(x, padding_mask=mask)
    assert_close("short", y[1, :2], layer(x[1, :2]))
    assert (y[mask] == 0).all()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_sequences_do_not_meet_but_their_tokens_do():
    torch.manual_seed(2)
    layer = make()
    x = torch.randn(2, 4, DIM, dtype=torch.float64)
    other = x.clone()
    other[0, 3] += 1
    change = (layer(other) - layer(x)).abs().amax(-1)
    assert (change[0] > 1e-6).all()
    assert (change[1] == 0).all()
    assert layer.leaks


def test_lower_precision_and_no_tokens():
    layer = SoftMoE(MLPExperts(DIM, 4, 2, seed=0), 2, seed=0).bfloat16()
    assert layer(torch.randn(2, 3, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer = make()
    assert layer(torch.zeros(0, 3, DIM, dtype=torch.float64)).shape == (0, 3, DIM)


def test_initial_values_follow_the_seed():
    one, two = make(seed=3), make(seed=4)
    two.reset_parameters(5)
    one.reset_parameters(5)
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert one.scale_1.item() == 1
    assert list(moe_layers(one)) == ["moe"]


def outputs(part=slice(None), mesh=None, dispatch="all_to_all"):
    x = normal(3, torch.arange(4 * 5 * DIM), torch.float64).view(4, 5, DIM)
    layer = make(num_experts=4)
    if mesh is not None:
        layer = parallelize(layer, mesh, zero=0, dispatch=dispatch)
    y = layer(x[part])
    y.square().sum().backward()
    grad = layer.phi_DS.grad
    return y.detach(), grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def on_ranks(dispatch):
    mesh = Mesh(ep=2)
    return outputs(slice(2 * mesh.rank, 2 * mesh.rank + 2), mesh, dispatch)


@pytest.mark.parametrize("dispatch", ["all_to_all", "static"])
def test_experts_shard_over_two_ranks(dispatch):
    y, grad = outputs()
    views = run_on_ranks(2, on_ranks, dispatch)
    assert_close("output", torch.cat([view[0] for view in views]), y)
    for view in views:
        assert_close("gradient", view[1], grad)


def split_sequence():
    parallelize(make(), Mesh(cp=2), zero=0)(torch.zeros(1, 2, DIM, dtype=torch.float64))


def test_parts_of_a_sequence_are_refused():
    with pytest.raises(Exception, match="set cp=1 and tp=1"):
        run_on_ranks(2, split_sequence)


def test_bad_input():
    with pytest.raises(ValueError, match="slots_per_expert must be at least 1, got 0"):
        make(slots=0)
    with pytest.raises(ValueError, match=r"x must have shape \(..., S, 6\), got \(6,\)"):
        make()(torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="padding_mask must be bool"):
        make()(torch.zeros(2, 6, dtype=torch.float64), padding_mask=torch.zeros(2))
