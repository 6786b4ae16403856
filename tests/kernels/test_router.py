"""The router's operations under Triton's interpreter against their definition in float64."""

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.router import (
    router_balance,
    router_choose,
    router_count,
    router_gates,
    router_logits,
    router_select,
    router_sums,
    router_z,
    serves,
)
from expertmesh.kernels.router.reference import (
    reference_choose,
    reference_gates,
    reference_logits,
)
from expertmesh.metrics import RoutingMeter
from expertmesh.random import RandomKey
from expertmesh.routing import (
    ROUTER_PRESETS,
    Capacity,
    LoadBalancingLoss,
    Routing,
    TopKRouter,
    ZLoss,
    router_preset,
    topk,
)
from expertmesh.routing.population import Arrangement, Population
from expertmesh.testing import assert_close

SHAPES = [(1, 8, 4, 1), (5, 24, 6, 2), (70, 40, 9, 9), (150, 40, 16, 8)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_as_exact_as_float32(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    T, D, E, _ = shape
    x = normal(T, D, seed=0).bfloat16().requires_grad_()
    weight = normal(E, D, seed=1).to(dtype).requires_grad_()
    logits, dlogits = router_logits(x, weight), normal(T, E, seed=2)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference_logits(*wide)
    assert_close("logits", logits, expected.float(), 1e-6)
    dx, dweight = torch.autograd.grad(logits, (x, weight), dlogits)
    exact = torch.autograd.grad(expected, wide, dlogits.double())
    assert_close("dx", dx, exact[0].bfloat16(), 1e-3)  # rounded once, as the expected value is
    assert_close("dweight", dweight, exact[1].to(dtype), 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    given = [normal(9, 8, seed=0).bfloat16(), normal(4, 8, seed=1)]
    given[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(router_logits(*given).sum(), given[wanted])
    assert grad.shape == given[wanted].shape
    assert grad.dtype == given[wanted].dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigmoid", [False, True])
def test_choose_matches_reference(shape: tuple[int, int, int, int], sigmoid: bool) -> None:
    T, _, E, K = shape
    logits = normal(T, E, seed=3)
    assert torch.equal(
        router_choose(logits, K, sigmoid), reference_choose(logits.double(), K, sigmoid)
    )


@pytest.mark.parametrize("sigmoid", [False, True])
def test_ties_go_to_the_lowest_index(sigmoid: bool) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert router_choose(logits, 4, sigmoid).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    # Scores tie where logits differ: all of these sigmoids are 1 in float32.
    assert router_choose(torch.tensor([[30.0, 50.0, 90.0]]), 2, True).tolist() == [[0, 1]]


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_large_logits(scale: float, sigmoid: bool) -> None:
    logits = normal(20, 6, seed=4) * scale
    chosen = router_choose(logits, 2, sigmoid)
    assert torch.equal(chosen, reference_choose(logits, 2, sigmoid))
    rule = {"sigmoid": sigmoid, "renormalize": True, "scale": 1.0}
    for got, want in zip(
        router_gates(logits, chosen, **rule), reference_gates(logits, chosen, **rule), strict=True
    ):
        assert_close("", got, want)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("sources", ["g", "s", "n", "sg", "sgn"])
def test_gates_match_reference(
    shape: tuple[int, int, int, int],
    sigmoid: bool,
    renormalize: bool,
    sources: str,
) -> None:
    """Gradients from any of scores, gates and norms."""
    T, _, E, K = shape
    logits = normal(T, E, seed=5).requires_grad_()
    chosen = reference_choose(logits.detach(), K, sigmoid)
    chosen[::3, -1] = E
    chosen[1:2] = E
    rule = {"sigmoid": sigmoid, "renormalize": renormalize, "scale": 1.7}
    wide = logits.detach().double().requires_grad_()
    actual = router_gates(logits, chosen, **rule)
    expected = reference_gates(wide, chosen, **rule)
    assert torch.equal(actual[2], expected[2])
    got = want = 0
    for name, i in (("score", 0), ("gate", 1), ("norm", 3)):
        assert_close(name, actual[i], expected[i].float(), 1e-6)
        if name[0] in sources:
            weights = normal(*actual[i].shape, seed=6)
            got, want = got + (actual[i] * weights).sum(), want + (expected[i] * weights).sum()
    (dlogits,) = torch.autograd.grad(got, logits)
    (exact,) = torch.autograd.grad(want, wide)
    assert_close("dlogits", dlogits, exact.float(), 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_select_is_choose_and_gates(
    shape: tuple[int, int, int, int], sigmoid: bool, renormalize: bool
) -> None:
    T, _, E, K = shape
    logits = normal(T, E, seed=10)
    rule = {"sigmoid": sigmoid, "renormalize": renormalize, "scale": 0.7}
    chosen, *rest = router_select(logits, K, **rule)
    assert torch.equal(chosen, reference_choose(logits.double(), K, sigmoid))
    expected = reference_gates(logits.double(), chosen, **rule)[:3]
    for name, got, want in zip(("score", "gate", "load"), rest, expected, strict=True):
        assert_close(name, got, want.to(got.dtype), 1e-6)


def test_scores_of_nothing_chosen_have_no_gradient_through_gates() -> None:
    logits = normal(3, 4, seed=7).requires_grad_()
    chosen = torch.full((3, 2), 4)
    gate = router_gates(logits, chosen, sigmoid=True, renormalize=True, scale=1.0)[1]
    (dlogits,) = torch.autograd.grad(gate.sum(), logits)
    assert gate.count_nonzero() == 0
    assert dlogits.count_nonzero() == 0


def step(x: Tensor, weight: Tensor) -> Tensor:
    logits = router_logits(x, weight)
    chosen = router_choose(logits, 2, False)
    score, gate, load, norm = router_gates(
        logits, chosen, sigmoid=False, renormalize=True, scale=1.0, factors=(x, weight)
    )
    return (gate * load[chosen]).sum() + score.square().sum() + norm.sum() + logits.exp().sum()


def test_compiles_as_one_graph_with_its_gradient() -> None:
    given = [normal(40, 8, seed=8).bfloat16().requires_grad_(), normal(4, 8, seed=9)]
    given[1].requires_grad_()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    eager, traced = step(*given), compiled(*given)
    assert torch.equal(eager, traced)
    expected, actual = (torch.autograd.grad(loss, given) for loss in (eager, traced))
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


def test_operations_describe_themselves() -> None:
    ops, checks = torch.ops.expertmesh, ("test_schema", "test_faketensor")
    x, weight = normal(150, 8, seed=0).bfloat16(), normal(5, 8, seed=1)
    logits = router_logits(x, weight)
    chosen = router_choose(logits, 2, False)
    score, gate, _, norm = router_gates(logits, chosen, sigmoid=False, renormalize=True, scale=1.0)
    narrow, parts = chosen.short(), torch.stack([logits, logits], dim=1)
    for op, given in (
        (ops.router_logits, (x, weight)),
        (ops.router_logits, (x[:3], weight)),
        (ops.router_logits_backward, (logits, x, weight, [True, False])),
        (ops.router_choose, (logits, 2, True)),
        (ops.router_select, (logits, 2, False, True, 1.0)),
        (ops.router_gates, (logits, chosen, False, True, 1.0)),
        (ops.router_sums, (score, chosen)),
        (ops.router_logits_again, (x, weight)),
        (ops.router_logits_again, (x, weight.bfloat16())),
        (ops.router_logits_again, (x[:3], weight)),
        (ops.router_gates_backward, (parts, narrow, None, gate, norm, False, True, 1.0)),
        (ops.router_gates_backward, (parts, narrow, score, None, None, True, True, 1.0)),
    ):
        torch.library.opcheck(op, given, test_utils=checks)


def test_the_cpu_is_not_served() -> None:
    assert not serves(torch.zeros(3, 8, dtype=torch.bfloat16), torch.zeros(4, 8))


@pytest.mark.parametrize("name", ROUTER_PRESETS)
@pytest.mark.parametrize("mode", ["train", "padded", "replayed", "eval"])
def test_a_router_is_the_same_by_kernels(
    name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = router_preset(name, dim=8, num_experts=16, seed=0).train(mode != "eval")
    x = normal(24, 8, seed=11).bfloat16()
    options: dict[str, object] = {
        "key": RandomKey.of(0, 0, torch.arange(24)),
        "sequence_length": 12,
    }
    if mode == "padded":
        options["padding_mask"] = torch.arange(24) % 5 == 0
    if mode == "replayed":
        options["routing"] = router(x, **options)

    def run() -> tuple[Routing, tuple[Tensor, ...]]:
        leaf = x.clone().requires_grad_()
        with torch.set_grad_enabled(mode != "eval"):
            routing = router(leaf, **options)
        if mode == "eval":
            return routing, ()
        loss = (routing.weight_TK * normal(*routing.weight_TK.shape, seed=12)).sum()
        loss = loss + sum(routing.losses.values())
        return routing, torch.autograd.grad(loss, (leaf, router.weight_ED))

    expected, gradients = run()
    monkeypatch.setattr(topk, "serves", lambda x_TD, weight_ED: True)
    monkeypatch.setattr("expertmesh.routing.evidence.counts", lambda score_TE: True)
    actual, by_kernels = run()
    for field in ("chosen_TK", "expert_TK", "load_E", "num_dropped"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field
    assert_close("weights", actual.weight_TK, expected.weight_TK, 1e-6)
    assert_close("logits", actual.logits_TE, expected.logits_TE, 1e-6)
    for loss in expected.losses:
        assert_close(loss, actual.losses[loss], expected.losses[loss], 1e-5)
    for got, want, tol in zip(by_kernels, gradients, (2e-3, 1e-5), strict=False):
        assert_close("gradient", got, want, tol)


@pytest.mark.parametrize("training", [True, False])
def test_batch_priority_is_the_same_by_kernels(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = {"order": "priority", "factor": 0.5, "eval_factor": 0.5}
    router = router_preset("tutel", dim=8, num_experts=6, seed=0, capacity=capacity)
    x = normal(64, 8, seed=11).bfloat16()

    def run() -> Tensor:
        with torch.set_grad_enabled(training):
            return router.train(training)(x).expert_TK

    expected = run()
    assert (expected == 6).any()
    monkeypatch.setattr(topk, "serves", lambda x_TD, weight_ED: True)
    assert torch.equal(run(), expected)


@pytest.mark.parametrize("capacity", [Capacity(factor=1.0), None])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k", "length"),
    [(1, 4, 2, None), (40, 16, 8, 20), (7, 6, 1, None), (330, 40, 3, 33)],
)
def test_counters_by_kernels(
    tokens: int, num_experts: int, k: int, length: int | None, capacity: Capacity | None
) -> None:
    router = TopKRouter(8, num_experts, k, seed=0, capacity=capacity)
    one_by_one = RoutingMeter(num_experts)
    counters = one_by_one._zeros(torch.device("cpu"))
    names = ("load", "choices", "dropped", "tokens", "entropy", "max_logit")
    for step in range(3):
        routing = router(normal(tokens, 8, seed=step), sequence_length=length)
        one_by_one.count(routing, tokens, None, length)
        router_count(
            routing.logits_TE,
            routing.chosen_TK,
            routing.dropped_TK,
            routing.load_E,
            [counters[name] for name in names],
            length or tokens,
        )
    for name, metric in one_by_one.read().items():
        assert_close(name, counters[name], metric.value, 1e-5 if name == "entropy" else None)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "k", "size"),
    [(1, 4, 2, 1), (40, 6, 1, 20), (300, 5, 3, 300), (1200, 5, 2, 600)],
)
def test_load_times_probability(tokens: int, num_experts: int, k: int, size: int) -> None:
    score = normal(tokens, num_experts, seed=8).exp().requires_grad_()
    chosen = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)])
    chosen[::4, -1] = num_experts
    wide = score.detach().double().requires_grad_()
    share = torch.nn.functional.one_hot(chosen, num_experts + 1)[..., :num_experts].sum(1)
    groups = (-1, size, num_experts)
    mean = (wide / wide.sum(1, keepdim=True)).view(groups).mean(1)
    expected = (share.double().view(groups).mean(1) * mean).sum(1)
    got = router_balance(score, chosen, size)
    assert_close("product", got, expected.float(), 1e-6)
    grad = normal(len(expected), seed=9)
    (dscore,) = torch.autograd.grad(got, score, grad)
    (exact,) = torch.autograd.grad(expected, wide, grad.double())
    assert_close("dscore", dscore, exact.float(), 1e-5)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(1, 4, 2), (300, 5, 3), (1025, 2, 1)])
def test_sums_of_load_and_probability(tokens: int, num_experts: int, k: int) -> None:
    score = normal(tokens, num_experts, seed=8).exp().requires_grad_()
    chosen = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)])
    chosen[::4, -1] = num_experts
    wide = score.detach().double().requires_grad_()
    share = torch.nn.functional.one_hot(chosen, num_experts + 1)[..., :num_experts].sum((0, 1))
    total = (wide / wide.sum(1, keepdim=True)).sum(0)
    got = router_sums(score, chosen)
    assert torch.equal(got[:num_experts].long(), share)
    assert_close("probability", got[num_experts:-1], total.float(), 1e-6)
    assert got[-1] == tokens
    (nothing,) = torch.autograd.grad(got.sum(), score, retain_graph=True)
    assert nothing.abs().max() < 1e-6  # probabilities add up to 1, whatever the scores
    grad = normal(2 * num_experts + 1, seed=9)
    (dscore,) = torch.autograd.grad(got, score, grad)
    (exact,) = torch.autograd.grad(total, wide, grad[num_experts:-1].double())
    assert_close("dscore", dscore, exact.float(), 1e-5)


class Twins(Population):
    """Two ranks with the same tokens."""

    num_ranks, ranks_per_sequence, sequence_part = 2, 1, (0, 1)

    def __init__(self) -> None:
        self.sent: list[int] = []

    def total(self, value: Tensor, *, copies: int = 1) -> Tensor:
        self.sent.append(value.numel())
        return value + value.detach() * (2 * copies - 1)

    def sequence_total(self, value_BX: Tensor) -> Tensor:
        return value_BX

    def arrange(self, *args: object) -> Arrangement:
        raise AssertionError("nothing here asks for an order")

    def for_training(self, loss: Tensor) -> Tensor:
        return loss


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("first", [0, 1])
def test_losses_of_several_ranks_by_kernels(
    monkeypatch: pytest.MonkeyPatch, score: str, first: int
) -> None:
    """Ranks that cannot use them, having padding or no tokens, send as many numbers."""
    losses = [LoadBalancingLoss(coef=0.3, form="megablocks"), ZLoss(coef=0.1)]
    losses = [losses[first], losses[1 - first]]
    router = TopKRouter(8, 6, 2, score=score, init_std=1.0, seed=0, losses=losses)
    router.population = twins = Twins()
    x = normal(40, 8, seed=1)

    def run() -> tuple[dict[str, Tensor], Tensor]:
        found = router(x, sequence_length=10).losses
        return found, torch.autograd.grad(sum(found.values()), router.weight_ED)[0]

    (expected, exact), asked = run(), []
    without_kernels = list(twins.sent)
    monkeypatch.setattr("expertmesh.routing.evidence.counts", lambda table: not asked.append(table))
    twins.sent.clear()
    actual, gradient = run()
    assert asked
    assert twins.sent == without_kernels
    assert len(twins.sent) == 2
    for name in expected:
        assert_close(name, actual[name], expected[name], 1e-5)
    assert_close("gradient", gradient, exact, 1e-5)


@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (40, 40), (40, 20)])
def test_load_times_probability_of_a_softmax(tokens: int, size: int) -> None:
    """Its gradient is right once it has passed the softmax, with another of the scores, too."""
    logits = normal(tokens, 6, seed=8).requires_grad_()
    chosen = reference_choose(logits.detach(), 2, False)
    rule = {"sigmoid": False, "renormalize": True, "scale": 1.0}
    wide = logits.detach().double().requires_grad_()
    grad, other = normal(tokens // size, seed=9), normal(tokens, 6, seed=10)
    for also in (0.0, 1.0):
        score = router_gates(logits, chosen, **rule)[0]
        got = (router_balance(score, chosen, size, softmax=True) * grad).sum()
        share = torch.nn.functional.one_hot(chosen, 6).sum(1).double().view(-1, size, 6).mean(1)
        exact_score = wide.softmax(1)
        want = ((share * exact_score.view(-1, size, 6).mean(1)).sum(1) * grad).sum()
        (dlogits,) = torch.autograd.grad(got + also * (score * other).sum(), logits)
        (exact,) = torch.autograd.grad(want + also * (exact_score * other).sum(), wide)
        assert_close("dlogits", dlogits, exact.float(), 1e-5)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [9, 150])
def test_gradients_by_logits_computed_again(tokens: int, dtype: torch.dtype, sigmoid: bool) -> None:
    x = normal(tokens, 40, seed=0).bfloat16().requires_grad_()
    weight = normal(5, 40, seed=1).div(6).to(dtype).requires_grad_()
    gradients = []
    for factors in (None, (x, weight)):
        logits = router_logits(x, weight)
        chosen = router_choose(logits, 2, sigmoid)
        score, gate, _, norm = router_gates(
            logits, chosen, sigmoid=sigmoid, renormalize=False, scale=1.0, factors=factors
        )
        loss = score.square().sum() + (gate * normal(tokens, 2, seed=2)).sum() + norm.sum()
        gradients.append(torch.autograd.grad(loss, (x, weight)))
    exact = tokens <= 128 or dtype == torch.bfloat16
    for name, tol, held, again in zip(("x", "weight"), (2e-3, 1e-5), *gradients, strict=True):
        assert_close(name, again, held, 0.0 if exact else tol)


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(("tokens", "num_experts"), [(1, 1), (3, 2), (40, 6), (2100, 5)])
def test_mean_of_squared_logsumexp(tokens: int, num_experts: int, scale: float) -> None:
    logits = (scale * normal(tokens, num_experts, seed=10)).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    expected = (wide.logsumexp(1) ** 2).mean()
    got = router_z(logits)
    assert_close("z", got, expected.float(), 1e-6)
    (dlogits,) = torch.autograd.grad(3 * got, logits)
    (exact,) = torch.autograd.grad(3 * expected, wide)
    assert_close("dlogits", dlogits, exact.float(), 1e-5)


def test_squared_logsumexp_where_logits_are_infinite() -> None:
    logits = torch.tensor([[-torch.inf, 0.5, 1.0], [0.0, -torch.inf, 2.0]], requires_grad=True)
    expected = (logits.logsumexp(1) ** 2).mean()
    got = router_z(logits)
    assert_close("z", got.detach(), expected.detach(), 1e-6)
    assert_close("d", *(torch.autograd.grad(z, logits)[0] for z in (got, expected)), 1e-5)
    assert router_z(torch.full((2, 3), -torch.inf)).isinf()
    assert router_z(torch.tensor([[torch.nan, 0.0]])).isnan()
