import pytest
import torch

from expertmesh.routing import (
    BatchwiseRouter,
    DeviceBalanceLoss,
    GlobalEntropyLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    LocalEntropyLoss,
    ThresholdLoss,
    ZLoss,
)
from expertmesh.routing.losses import squared_cv

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def identity(k=2.0, **options):
    router = BatchwiseRouter(4, 4, k, dtype=torch.float64, **options)
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(4))
    return router


def table(routing, num_tokens=12):
    token_N = torch.arange(num_tokens) if routing.token_N is None else routing.token_N
    out = routing.weight_TK.new_zeros(num_tokens, 5)
    token_NK = token_N[:, None].expand_as(routing.expert_TK)
    return out.index_put((token_NK, routing.expert_TK), routing.weight_TK)[:, :4]


def test_training_is_the_plain_definition_and_evaluation_uses_thresholds():
    router = identity()
    score = X.softmax(1)
    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask.scatter_(0, score.sort(dim=0, descending=True).indices[:6], True)
    gate = torch.where(mask, score, 0)
    expected = gate / gate.sum(1, keepdim=True).clamp_min(1e-300)
    routing = router(X)
    torch.testing.assert_close(table(routing), expected)
    assert routing.load_E.tolist() == [6] * 4
    # With thresholds just under each expert's last token, evaluation chooses as training did.
    with torch.no_grad():
        router.threshold_E.copy_(torch.where(mask, score, 9.0).amin(0) - 1e-9)
    torch.testing.assert_close(table(router.eval()(X)), expected)
    assert torch.equal(router(X[:3]).expert_TK, router(X).expert_TK[:3])
    with torch.no_grad():
        router.threshold_E.fill_(1.0)
    assert router(X).load_E.sum() == 0


def test_threshold_loss_is_the_formula_and_its_gradient_moves_thresholds_the_right_way():
    router = identity(losses=(ThresholdLoss(coef=2.0),))
    score = X.softmax(1)
    mask = torch.zeros(12, 4, dtype=torch.bool)
    mask.scatter_(0, score.sort(dim=0, descending=True).indices[:6], True)
    expected = 0.0
    for t in range(12):
        for e in range(4):
            over = score[t, e].item() - 0.25
            expected += ((over > 0) - mask[t, e].item()) * over
    loss = router(X).losses["threshold"]
    assert loss.item() == pytest.approx(2.0 * expected / 12)
    assert loss >= 0
    loss.backward()
    wrong = (score > 0.25).double() - mask.double()
    torch.testing.assert_close(router.threshold_E.grad, -2.0 * wrong.sum(0) / 12)


def test_thresholds_learn_to_choose_as_many_tokens():
    router = identity(losses=(ThresholdLoss(coef=1.0),))
    optimizer = torch.optim.SGD([router.threshold_E], lr=0.02)
    x = torch.randn(400, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(300):
        optimizer.zero_grad()
        router(x).losses["threshold"].backward()
        optimizer.step()
    load = router.eval()(x).load_E
    assert load.tolist() == pytest.approx([200] * 4, abs=10)


def test_importance_is_that_of_the_combine_weights():
    router = identity(losses=(ImportanceLoss(coef=1.0),))
    routing = router(X)
    expected = squared_cv(table(routing).sum(0)[None], "population")[0]
    assert expected > 1e-3
    torch.testing.assert_close(routing.losses["importance"], expected)
    every = (ThresholdLoss(), ImportanceLoss(coef=1.0), ZLoss(coef=1.0))
    every += (LocalEntropyLoss(coef=1.0), GlobalEntropyLoss(coef=1.0))
    assert all(loss.isfinite() for loss in identity(losses=every)(X).losses.values())


def test_losses_on_k_choices_of_a_token_are_refused():
    for loss in (
        LoadBalancingLoss(coef=1.0),
        LoadLoss(coef=1.0),
        DeviceBalanceLoss(coef=1.0, num_groups=2),
    ):
        with pytest.raises(ValueError, match=f"{type(loss).__name__} counts k .* ImportanceLoss"):
            identity(losses=(loss,))


def test_bad_input():
    with pytest.raises(ValueError, match="k must be above 0 and at most num_experts=4"):
        identity(5)
    with pytest.raises(ValueError, match="init_std must be a finite number of at least 0, got -1"):
        BatchwiseRouter(4, 4, 2, init_std=-1.0)
    with pytest.raises(ValueError, match=r"take k \* tokens .* rounds to zero; set k to at least"):
        identity(1.0)(X[:3])
    with pytest.raises(ValueError, match="losses must have different names"):
        identity(losses=(ThresholdLoss(), ThresholdLoss()))
