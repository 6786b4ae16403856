"""The layer, its draws and its model on a GPU: the same as on the CPU."""

import copy

import pytest
import torch

from expertmesh import random
from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE, moe_layers
from expertmesh.metrics import summarize
from expertmesh.models import DecoderLM, decoder_preset
from expertmesh.random import RandomKey
from expertmesh.routing import (
    ROUTER_PRESETS,
    Capacity,
    LoadBalancingLoss,
    NormalNoise,
    TopKRouter,
    ZLoss,
    router_preset,
)
from expertmesh.testing import assert_close

pytestmark = pytest.mark.gpu

D, F, E, T = 64, 96, 32, 200


def test_draws_are_the_same_on_both_devices():
    index = torch.arange(10_000)
    assert torch.equal(random.uniform(3, index), random.uniform(3, index.cuda()).cpu())
    assert_close("normal", random.normal(3, index.cuda()).cpu(), random.normal(3, index), tol=1e-6)


def test_initial_values_are_the_same_on_both_devices():
    config = decoder_preset("nano")
    here = DecoderLM(config, seed=1)
    with torch.device("cuda"):
        there = DecoderLM(config, seed=1)
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert b.is_cuda
        assert_close(name, b.cpu(), a, tol=1e-6)


@pytest.mark.parametrize("name", ROUTER_PRESETS)
def test_layer_equals_the_cpu_in_float64(name):
    torch.manual_seed(0)
    router = router_preset(name, dim=D, num_experts=E, seed=0, dtype=torch.float64)
    here = MoE(router, GatedMLPExperts(D, F, E, seed=0, dtype=torch.float64))
    there = copy.deepcopy(here).cuda()
    x = torch.randn(4, T // 4, D, dtype=torch.float64, requires_grad=True)
    z = x.detach().cuda().requires_grad_()
    key = RandomKey.of(0, 1, torch.arange(T).view(4, -1))
    y, routing = here(x, key=key, return_routing=True)
    w, placed = there(z, key=RandomKey(key.seed, key.token_index.cuda()), return_routing=True)
    assert torch.equal(placed.expert_TK.cpu(), routing.expert_TK)
    assert_close("y", w.cpu(), y, tol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    w.backward(g.cuda())
    assert_close("x", z.grad.cpu(), x.grad, tol=1e-10)
    for (label, a), b in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert_close(label, b[1].grad.cpu(), a.grad, tol=1e-10)
    ours, theirs = summarize(there.metrics()), summarize(here.metrics())
    assert ours.load == theirs.load
    assert ours.dropped_by_position == theirs.dropped_by_position


@pytest.mark.parametrize("options", [{}, {"capacity": Capacity(factor=1.0)}])
def test_bf16_training_needs_no_host_synchronisation(options):
    losses = (LoadBalancingLoss(coef=0.01), ZLoss(coef=1e-3))
    router = TopKRouter(D, E, 2, noise=NormalNoise(), losses=losses, device="cuda", **options)
    moe = MoE(router, GatedMLPExperts(D, F, E, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(4, 64, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key = RandomKey.of(0, 1, torch.arange(256, device="cuda").view(4, 64))
    moe(x, key=key).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moe(x, key=key).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeated_runs_are_bitwise_equal():
    moe = MoE(
        TopKRouter(D, E, 4, seed=0, device="cuda"),
        GatedMLPExperts(D, F, E, seed=0, device="cuda", dtype=torch.bfloat16),
    )
    x = torch.randn(512, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run():
        moe.zero_grad()
        x.grad = None
        y = moe(x)
        y.backward(torch.ones_like(y))
        return [y, x.grad, *(p.grad for p in moe.parameters())]

    first = [t.clone() for t in run()]
    for a, b in zip(first, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_decoder_trains_in_bf16_autocast(checkpointed):
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DecoderLM(decoder_preset("nano"), seed=0)
        tokens = torch.randint(0, 32, (8, 129))
    if checkpointed:
        model.checkpoint_blocks()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(summarize(moe.metrics()).dropped == 0 for moe in moe_layers(model).values())


def test_compiled_layer_equals_eager():
    router = TopKRouter(D, E, 2, losses=(ZLoss(coef=0.1),), seed=0, device="cuda")
    moe = MoE(router, GatedMLPExperts(D, F, E, seed=0, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(256, D, device="cuda", dtype=torch.bfloat16)
    expected = moe(x)
    expected.float().square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters()}
    moe.zero_grad()
    actual = torch.compile(moe)(x)
    assert_close("y", actual, expected, tol=2e-2)
    actual.float().square().sum().backward()
    for name, p in moe.named_parameters():
        assert_close(name, p.grad, gradients[name], tol=3e-2)
