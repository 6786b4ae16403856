import pytest
import torch

from expertmesh.routing import (
    GlobalEntropyLoss,
    GroupLimit,
    LoadBalancingLoss,
    LocalEntropyLoss,
    TopKRouter,
)
from expertmesh.routing.group_losses import CommunicationBalanceLoss, DeviceBalanceLoss
from expertmesh.testing import run_on_ranks
from tests.distributed.layers import alone, assert_same, on_mesh


def value(router, x, **arguments):
    (loss,) = router.train()(x, **arguments).losses.values()
    return float(loss.detach())


def plain(x, k, num_groups, kept=None):
    """Both losses by loops over groups, experts and tokens."""
    p = x.softmax(1)
    T, E = p.shape
    size = E // num_groups
    chosen = p.topk(k, dim=1).indices
    device = communication = 0.0
    for d in range(num_groups):
        experts = range(d * size, (d + 1) * size)
        mean = sum(float(p[:, e].mean()) for e in experts)
        f = [E / (k * T) * int((chosen == e).sum()) for e in experts]
        device += sum(f) / size * mean
        reached = sum(any(int(c) in experts for c in chosen[t]) for t in range(T))
        communication += num_groups / ((kept or 1) * T) * reached * mean
    return device, communication


@pytest.mark.parametrize(("k", "num_groups", "kept"), [(2, 4, 2), (3, 2, 2), (1, 8, 1), (4, 1, 1)])
def test_values_by_the_definition(k, num_groups, kept, identity_router):
    x = torch.randn(13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
    device, communication = plain(x, k, num_groups, kept)
    router = identity_router(k, 8, losses=(DeviceBalanceLoss(coef=1.0, num_groups=num_groups),))
    assert value(router, x) == pytest.approx(device, abs=1e-12)
    loss = CommunicationBalanceLoss(coef=0.5, num_groups=num_groups, kept=kept)
    assert value(identity_router(k, 8, losses=(loss,)), x) == pytest.approx(
        communication / 2, abs=1e-12
    )


def test_one_expert_a_group_is_the_expert_balance(four_tokens, identity_router):
    expected = value(
        identity_router(2, losses=(LoadBalancingLoss(coef=1.0, form="megablocks"),)), four_tokens
    )
    router = identity_router(2, losses=(DeviceBalanceLoss(coef=1.0, num_groups=4),))
    assert value(router, four_tokens) == pytest.approx(expected, abs=1e-12)
    loss = CommunicationBalanceLoss(coef=1.0, num_groups=4, kept=2)
    assert value(identity_router(2, losses=(loss,)), four_tokens) == pytest.approx(
        expected, abs=1e-12
    )


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", 4])
def test_value_at_perfect_balance(scope, identity_router):
    x = torch.tensor([[3.0, 0.0, 2.0, 0.0]], dtype=torch.float64)  # one choice in each group
    x = torch.cat([x.roll(shift, 1) for shift in range(4)]).repeat(4, 1)
    for loss in (
        DeviceBalanceLoss(coef=1.0, num_groups=2, scope=scope),
        CommunicationBalanceLoss(coef=1.0, num_groups=2, kept=2, scope=scope),
    ):
        router = identity_router(2, losses=(loss,))
        assert value(router, x, sequence_length=8) == pytest.approx(1, abs=1e-12)


def test_the_losses_train_with_a_group_limit_and_ignore_padding():
    torch.manual_seed(0)
    x = torch.randn(12, 8, dtype=torch.float64)
    mask = torch.arange(12) >= 9
    losses = (
        DeviceBalanceLoss(coef=1.0, num_groups=4),
        CommunicationBalanceLoss(coef=1.0, num_groups=4, kept=2),
    )
    limit = GroupLimit(num_groups=4, kept=2, score="max")
    router = TopKRouter(
        8, 8, 3, group_limit=limit, losses=losses, seed=0, init_std=1.0, dtype=torch.float64
    )
    padded, alone = router(x, padding_mask=mask).losses, router(x[:9]).losses
    for name, loss in padded.items():
        assert loss.item() == pytest.approx(alone[name].item(), abs=1e-12)
        (grad,) = torch.autograd.grad(loss, router.weight_ED, retain_graph=True)
        assert grad.abs().sum() > 0


def test_two_ranks_measure_what_one_does():
    # Entropies too: all four are sums over the tokens of all ranks.
    losses = (
        DeviceBalanceLoss(coef=0.3, num_groups=4),
        CommunicationBalanceLoss(coef=0.2, num_groups=2, kept=2),
        LocalEntropyLoss(coef=0.1),
        GlobalEntropyLoss(coef=0.4, threshold=2.0),
    )
    options = {"losses": losses}
    views = run_on_ranks(2, on_mesh, {"ep": 2}, 13, None, 2, options)
    assert_same(views, alone(13, options))


def test_bad_numbers(identity_router, four_tokens):
    router = identity_router(1, losses=(DeviceBalanceLoss(coef=1.0, num_groups=3),))
    with pytest.raises(ValueError, match="num_groups to divide the number of experts 4"):
        router(four_tokens)
    with pytest.raises(ValueError, match="num_groups of the device_balance loss must be a whole"):
        DeviceBalanceLoss(coef=1.0, num_groups=0)
    with pytest.raises(ValueError, match="at most num_groups=2, got 3"):
        CommunicationBalanceLoss(coef=1.0, num_groups=2, kept=3)
    with pytest.raises(ValueError, match="scope must be"):
        CommunicationBalanceLoss(coef=1.0, num_groups=2, kept=1, scope="all")
