import pytest
import torch

from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.routing import ExpertChoiceRouter, TokenCap, TopKRouter
from expertmesh.routing.auction import balanced_assignment


def identity(factor, num_experts=4, **options):
    router = ExpertChoiceRouter(num_experts, num_experts, factor, dtype=torch.float64, **options)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(num_experts))
    return router


def by_expert(routing, num_experts):
    """Tokens with their weights, for each expert."""
    found = [{} for _ in range(num_experts)]
    rows = zip(routing.token_N, routing.expert_TK, routing.weight_TK.detach(), strict=True)
    for token, expert, weight in rows:
        if expert < num_experts:
            found[expert][int(token)] = float(weight)
    return found


def test_reference_numbers(four_tokens):
    """The third expert's tokens 0 and 1 score the same: ties go to the earlier."""
    found = by_expert(identity(2.0)(four_tokens), 4)
    expected = [
        {2: 0.830953, 3: 0.748832},
        {1: 0.643914, 0: 0.236883},
        {2: 0.112457, 0: 0.087144},
        {3: 0.061468, 0: 0.032059},
    ]
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", 6])
def test_is_the_plain_definition(scope):
    x = torch.randn(24, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[3] = x[4] = x[20]
    router = identity(1.7, 5, scope=scope)
    found = by_expert(router(x, sequence_length=8), 5)
    size = {"micro_batch": 24, "sequence": 8}.get(scope, scope)
    score = x.softmax(1)
    for expert in range(5):
        taken = {}
        for begin in range(0, 24, size):
            group = sorted(range(begin, begin + size), key=lambda t: (-score[t, expert].item(), t))
            taken |= {t: score[t, expert].item() for t in group[: int(size * 1.7 / 5)]}
        assert found[expert] == pytest.approx(taken, abs=1e-12)


def test_layer_is_the_sum_over_experts_with_all_gradients():
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moe = MoE(ExpertChoiceRouter(4, 3, 2.0, seed=0, init_std=1.0), MLPExperts(4, 6, 3, seed=0))
    moe = moe.double()
    params = list(moe.parameters())

    def plain(x):
        score = (x @ moe.router.weight_ED.T).softmax(1)
        y = torch.zeros_like(x)
        for expert in range(3):
            tokens = score[:, expert].sort(descending=True, stable=True).indices[:6]
            ids = torch.full((6, 1), expert)
            out = moe.experts(x[tokens], ids, torch.ones(6, 1, dtype=torch.float64))
            y = y.index_add(0, tokens, score[tokens, expert, None] * out)
        return y

    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = moe(first), plain(second)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual.square().sum(), [first, *params])
    wanted = torch.autograd.grad(expected.square().sum(), [second, *params])
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want)


def test_padding_leaves_slots_empty():
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([False] * 3 + [True] * 5)
    routing = identity(2.0)(x, padding_mask=mask)
    assert routing.expert_TK.shape == (16, 1)
    assert routing.load_E.tolist() == [3] * 4
    assert routing.num_dropped == 0


def test_extreme_logits_stay_finite():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for cap in (None, TokenCap(most=2)):
        routing = identity(2.0, 3, cap=cap)(x)
        assert routing.weight_TK.isfinite().all()
        assert routing.load_E.tolist() == [2, 2, 2]


def test_cap_holds_for_every_token_and_drops_are_counted():
    x = torch.randn(128, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    free = identity(2.0, 8)(x)
    per_token = torch.bincount(free.token_N, minlength=128)
    assert per_token.max() > 2
    routing = identity(2.0, 8, cap=TokenCap(most=2))(x)
    kept = routing.token_N[routing.expert_TK[:, 0] < 8]
    assert torch.bincount(kept, minlength=128).max() <= 2
    assert routing.num_dropped == 256 - len(kept)
    assert routing.num_dropped <= 8
    assert (routing.weight_TK[routing.dropped_TK] == 0).all()
    assert routing.load_E.tolist() == [32] * 8


def test_cap_is_near_the_best_capped_choice():
    """Where each token has one expert, the cap's choice is a balanced assignment."""
    x = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    score = x.softmax(1)
    best = balanced_assignment(score, tolerance=1e-5)
    routing = identity(1.0, 4, cap=TokenCap(most=1))(x)
    reached = score[routing.token_N, routing.chosen_TK[:, 0]].sum()
    assert routing.num_dropped <= 3
    assert reached == pytest.approx(score[torch.arange(60), best].sum().item(), rel=0.02)
    a_SE = TokenCap(most=1, iterations=2000).assign(score[None].float(), 15)[0]
    assert a_SE.sum(0).tolist() == pytest.approx([15.0] * 4, rel=1e-3)
    assert a_SE.sum(1).max() <= 1.01
    assert a_SE.max() <= 1.01


def test_bad_input():
    for factor in (0, 5, -1.0):
        with pytest.raises(ValueError, match="factor must be above 0 and at most num_experts=4"):
            ExpertChoiceRouter(4, 4, factor)
    with pytest.raises(ValueError, match=r"cap\.most must be at least factor=2\.0"):
        ExpertChoiceRouter(4, 4, 2.0, cap=TokenCap(most=1))
    with pytest.raises(ValueError, match="init_std must be a finite number of at least 0, got -1"):
        ExpertChoiceRouter(4, 4, init_std=-1.0)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        TokenCap(most=2, temperature=0.0)
    with pytest.raises(ValueError, match="rounds to zero; set factor to at least 2"):
        identity(1.0)(torch.zeros(2, 4))
    x = torch.zeros(4, 4, dtype=torch.float64)
    recorded = TopKRouter(4, 4, 1)(x)
    with pytest.raises(ValueError, match="in which experts choose, got one in which tokens do"):
        identity(1.0)(x, routing=recorded)
