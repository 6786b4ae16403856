"""The router's kernels on CUDA against their definition in float64. Run with ``-m gpu``."""

import copy

import pytest
import torch
from torch import Tensor

from expertmesh.experts import GatedMLPExperts
from expertmesh.kernels.router import (
    router_choose,
    router_gates,
    router_logits,
    router_select,
    router_sums,
)
from expertmesh.kernels.router.reference import (
    reference_choose,
    reference_gates,
    reference_logits,
)
from expertmesh.layer import MoE
from expertmesh.routing import ROUTER_PRESETS, router_preset
from expertmesh.testing import assert_close

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 2048, 64, 8),
    (3, 1000, 6, 2),
    (128, 4096, 8, 2),
    (129, 512, 7, 7),
    (1000, 264, 60, 6),
    (5000, 2048, 128, 8),
]


def given(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    T, D, E, _ = shape
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(T, D, device="cuda", generator=g).bfloat16()
    weight = torch.randn(E, D, device="cuda", generator=g) / D**0.5
    return [x.requires_grad_(), weight.to(dtype).requires_grad_()]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_and_gradients(shape: tuple[int, int, int, int]) -> None:
    """Of float32 weights. Tensor cores cut off what they add; the error grows with the sum."""
    x, weight = given(shape)
    logits = router_logits(x, weight)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference_logits(*wide)
    dlogits = torch.randn_like(logits)
    assert_close("logits", logits, expected.float(), 1e-5)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    exact = torch.autograd.grad(expected, wide, dlogits.double())
    assert_close("dx", dx, exact[0].bfloat16(), 2e-3)
    assert_close("dweight", dweight, exact[1].float(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_weights(shape: tuple[int, int, int, int]) -> None:
    x, weight = given(shape, torch.bfloat16)
    expected = reference_logits(x.double(), weight.double()).float()
    assert_close("logits", router_logits(x, weight), expected, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_choice_and_gates(
    shape: tuple[int, int, int, int], sigmoid: bool, renormalize: bool
) -> None:
    T, _, E, K = shape
    logits = torch.randn(T, E, device="cuda", requires_grad=True)
    rule = {"sigmoid": sigmoid, "renormalize": renormalize, "scale": 1.3}
    chosen = router_choose(logits, K, sigmoid)
    assert torch.equal(chosen, reference_choose(logits.detach(), K, sigmoid))
    with torch.no_grad():
        fused = router_select(logits, K, **rule)
        apart = (chosen, *router_gates(logits, chosen, **rule)[:3])
    for name, a, b in zip(("chosen", "score", "gate", "load"), fused, apart, strict=True):
        assert_close(name, a, b, 2e-7 if a.is_floating_point() else 0.0)  # sums in other orders
    chosen[::3, -1] = E
    wide = logits.detach().double().requires_grad_()
    score, gate, load, norm = router_gates(logits, chosen, **rule)
    expected = reference_gates(wide, chosen, **rule)
    assert_close("score", score, expected[0].float(), 1e-6)
    assert_close("gate", gate, expected[1].float(), 1e-6)
    assert torch.equal(load, expected[2])
    assert_close("norm", norm, expected[3].float(), 1e-6)
    grads = [torch.randn_like(value) for value in (score, gate, norm)]
    (dlogits,) = torch.autograd.grad((score, gate, norm), logits, grads)
    wanted = (expected[0], expected[1], expected[3])
    (exact,) = torch.autograd.grad(wanted, wide, [g.double() for g in grads])
    assert_close("dlogits", dlogits, exact.float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_load_and_probability(shape: tuple[int, int, int, int]) -> None:
    """Of sigmoids; of one token, of one program's and of more."""
    T, _, E, K = shape
    score = torch.rand(T, E, device="cuda").requires_grad_()
    chosen = torch.rand(T, E, device="cuda").topk(K).indices
    chosen[::3, 0] = E
    found = router_sums(score, chosen)
    wide = score.detach().double().requires_grad_()
    total = (wide / wide.sum(1, keepdim=True)).sum(0)
    assert torch.equal(found[:E].long(), chosen.flatten().bincount(minlength=E + 1)[:E])
    assert_close("probability", found[E:-1], total.float(), 1e-5)
    assert found[-1] == T
    grad = torch.randn_like(found)
    (dscore,) = torch.autograd.grad(found, score, grad)
    (exact,) = torch.autograd.grad(total, wide, grad[E:-1].double())
    assert_close("dscore", dscore, exact.float(), 1e-4)


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.randint(0, 3, (500, 64), device="cuda").float()
    for sigmoid in (False, True):
        assert torch.equal(router_choose(logits, 8, sigmoid), reference_choose(logits, 8, sigmoid))


@pytest.mark.parametrize("tokens", [16, 1000])
@pytest.mark.parametrize("name", ROUTER_PRESETS)
def test_layer_trains_as_without_kernels(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = router_preset(name, dim=64, num_experts=32, seed=0).cuda()
    experts = GatedMLPExperts(64, 96, 32, seed=0, device="cuda", dtype=torch.bfloat16)
    here, there = MoE(router, experts), MoE(copy.deepcopy(router), experts)
    x = torch.randn(2, tokens // 2, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for layer in (here, there):
        torch.manual_seed(0)
        y, routing = layer(x, return_routing=True)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.router.weight_ED)
        results.append((y, gradient, routing))
        monkeypatch.setattr("expertmesh.routing.topk.serves", lambda x_TD, weight_ED: False)
        monkeypatch.setattr("expertmesh.routing.losses.counts", lambda score_TE: False)
    for field in ("chosen_TK", "expert_TK", "load_E", "num_dropped"):
        assert torch.equal(getattr(results[0][2], field), getattr(results[1][2], field)), field
    assert_close("y", results[0][0], results[1][0], 1e-3)
    assert_close("gradient", results[0][1], results[1][1], 1e-3)


def test_same_bits_every_time() -> None:
    x, weight = given(SHAPES[-1])
    runs = []
    for _ in range(2):
        logits = router_logits(x, weight)
        gradients = torch.autograd.grad(logits.square().sum(), (x, weight))
        runs.append((logits, *gradients))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [16, 1000])
def test_compiles_with_its_gradient(tokens: int) -> None:
    router = router_preset("olmoe", dim=64, num_experts=32, seed=0, device="cuda")
    x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        return router(x, sequence_length=tokens).weight_TK.square().sum()

    expected, loss = step(), torch.compile(step, fullgraph=True)()
    assert_close("loss", loss, expected, 1e-5)
    got, want = (torch.autograd.grad(value, router.weight_ED)[0] for value in (loss, expected))
    assert_close("gradient", got, want)
