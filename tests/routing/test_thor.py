import pytest
import torch
from torch.nn import functional

from expertmesh.random import RandomKey
from expertmesh.routing import ThorRouter, consistency_loss

X = torch.randn(12, 3)


def test_training_draws_one_expert_for_the_batch():
    router = ThorRouter(3, 4)
    torch.manual_seed(0)
    drawn = [router(X).expert_TK.unique().tolist() for _ in range(200)]
    assert all(len(experts) == 1 for experts in drawn)
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=4)
    assert counts.min() > 25
    other = ThorRouter(3, 4, layer=1)
    keys = [RandomKey.of(0, step, torch.arange(12)) for step in range(20)]
    experts = [[int(r(X, key=key).expert_TK[0, 0]) for key in keys] for r in (router, other)]
    assert experts[0] != experts[1]


def test_evaluation_draws_by_token_or_by_sequence():
    by_token = ThorRouter(3, 4).eval()(X, sequence_length=4).expert_TK.view(3, 4)
    assert any(len(row.unique()) > 1 for row in by_token)
    by_sequence = ThorRouter(3, 64, evaluation="sequence").eval()
    experts = by_sequence(X, sequence_length=4).expert_TK.view(3, 4)
    assert (experts == experts[:, :1]).all()
    assert len(experts.unique()) > 1


def test_consistency_loss_is_the_symmetric_divergence():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    mask = torch.tensor([False, True, False, False, True])
    expected = 0.0
    for p, q in ((first, second), (second, first)):
        divergence = functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
        )
        expected = expected + 0.5 * 5.0 * divergence.sum(-1)[~mask].sum()
    spoilt = first.clone()
    spoilt[mask] = torch.nan
    spoilt.requires_grad_()
    loss = consistency_loss(spoilt, second, padding_mask=mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert spoilt.grad.isfinite().all()
    assert consistency_loss(first, first) == 0
    assert consistency_loss(1e4 * first, -1e4 * second).isfinite()
    assert consistency_loss(first.bfloat16(), second.bfloat16()).dtype == torch.float32


def test_bad_input():
    with pytest.raises(ValueError, match="evaluation must be 'token' or 'sequence'"):
        ThorRouter(3, 4, evaluation="sentence")
    with pytest.raises(ValueError, match="second must have first's shape"):
        consistency_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="coef of the consistency loss"):
        consistency_loss(torch.zeros(2, 3), torch.zeros(2, 3), coef=-1.0)
