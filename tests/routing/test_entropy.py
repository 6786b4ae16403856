import math

import pytest
import torch

from expertmesh.routing import TopKRouter
from expertmesh.routing.entropy import GlobalEntropyLoss, LocalEntropyLoss, entropy


def value(router, x, **arguments):
    (loss,) = router.train()(x, **arguments).losses.values()
    return float(loss.detach())


def plain_entropy(p):
    return -sum(float(q) * math.log(float(q)) for q in p if q > 0)


def test_values_by_the_definition(four_tokens, identity_router):
    p = four_tokens.softmax(1)
    local = sum(plain_entropy(row) for row in p) / 4
    overall = plain_entropy(p.mean(0))
    router = identity_router(2, losses=(LocalEntropyLoss(coef=2.0),))
    assert value(router, four_tokens) == pytest.approx(2 * local, abs=1e-12)
    router = identity_router(2, losses=(GlobalEntropyLoss(coef=3.0),))
    assert value(router, four_tokens) == pytest.approx(-3 * overall, abs=1e-12)
    router = identity_router(2, losses=(GlobalEntropyLoss(coef=1.0, threshold=1.2),))
    assert value(router, four_tokens) == pytest.approx(1.2 - overall, abs=1e-12)
    router = identity_router(2, losses=(GlobalEntropyLoss(coef=1.0, threshold=0.5),))
    assert value(router, four_tokens) == 0


def test_values_at_balance(identity_router):
    x = 50.0 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert value(identity_router(1, losses=(LocalEntropyLoss(coef=1.0),)), x) < 1e-12
    router = identity_router(1, losses=(GlobalEntropyLoss(coef=1.0),))
    assert value(router, x) == pytest.approx(-math.log(4), abs=1e-9)
    router = identity_router(1, losses=(GlobalEntropyLoss(coef=1.0, threshold=math.log(4)),))
    assert value(router, x) == pytest.approx(0, abs=1e-9)
    x = torch.zeros(3, 4, dtype=torch.float64)
    router = identity_router(1, losses=(LocalEntropyLoss(coef=1.0),))
    assert value(router, x) == pytest.approx(math.log(4), abs=1e-12)


def test_sigmoid_scores_are_normalised_first(identity_router):
    x = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    p = x.sigmoid()[0] / x.sigmoid().sum()
    router = identity_router(1, 3, score="sigmoid", losses=(LocalEntropyLoss(coef=1.0),))
    assert value(router, x) == pytest.approx(plain_entropy(p), abs=1e-12)


@pytest.mark.parametrize("loss", [LocalEntropyLoss(coef=1.0), GlobalEntropyLoss(coef=1.0)])
def test_padding_does_not_count_and_sequences_are_averaged(loss):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 3:] = True

    def make(loss):
        return TopKRouter(8, 4, 2, seed=0, dtype=torch.float64, init_std=1.0, losses=(loss,))

    router = make(loss)
    padded = value(router, x.view(-1, 8), padding_mask=mask.view(-1), sequence_length=6)
    assert padded == pytest.approx(value(router, x[~mask]), abs=1e-12)
    if isinstance(loss, GlobalEntropyLoss):
        router = make(GlobalEntropyLoss(coef=1.0, scope="sequence"))
        by_sequence = value(router, x.view(-1, 8), padding_mask=mask.view(-1), sequence_length=6)
        parts = [value(router, x[0], sequence_length=6), value(router, x[1, :3], sequence_length=3)]
        assert by_sequence == pytest.approx(sum(parts) / 2, abs=1e-12)


def test_gradients_are_right_and_finite_at_probability_zero():
    p = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropy, p)
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    entropy(logits.softmax(1)).sum().backward()
    assert logits.grad.isfinite().all()


def test_no_tokens(identity_router):
    x = torch.zeros(0, 4, dtype=torch.float64)
    for loss in (LocalEntropyLoss(coef=1.0), GlobalEntropyLoss(coef=1.0)):
        assert value(identity_router(1, losses=(loss,)), x) == 0


def test_thresholds_are_possible(identity_router, four_tokens):
    with pytest.raises(ValueError, match="above 0 nats, got 0"):
        GlobalEntropyLoss(coef=1.0, threshold=0.0)
    router = identity_router(1, losses=(GlobalEntropyLoss(coef=1.0, threshold=2.0),))
    with pytest.raises(ValueError, match=r"at most log\(E\) = 1.3863 for 4 experts"):
        router(four_tokens)
    with pytest.raises(ValueError, match="entropy loss scope"):
        GlobalEntropyLoss(coef=1.0, scope="world")
