"""How often the ranks meet for the losses of one layer: a wait each, however little is sent."""

import pytest
import torch

from expertmesh.routing import (
    CommunicationBalanceLoss,
    DeviceBalanceLoss,
    GlobalEntropyLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LocalEntropyLoss,
    TopKRouter,
    ZLoss,
)
from expertmesh.routing.population import Alone, Population


class Counting(Population):
    """One rank that counts how often it asks the others."""

    num_ranks = 1
    ranks_per_sequence = 1
    sequence_part = (0, 1)

    def __init__(self):
        self.meetings = 0

    def total(self, value, *, copies=1):
        self.meetings += 1
        return value

    def sequence_total(self, value_BX):
        self.meetings += 1
        return value_BX

    def arrange(self, num_tokens, sequence_length, key):
        return Alone().arrange(num_tokens, sequence_length, key)

    def for_training(self, loss):
        return loss


def each(scope):
    return [
        LoadBalancingLoss(coef=1.0, scope=scope),
        ImportanceLoss(coef=1.0, scope=scope),
        ImportanceLoss(coef=1.0, scope=scope, of="probabilities"),
        DeviceBalanceLoss(coef=1.0, num_groups=2, scope=scope),
        CommunicationBalanceLoss(coef=1.0, num_groups=2, kept=1, scope=scope),
        GlobalEntropyLoss(coef=1.0, scope=scope),
    ]


OVER_TOKENS = [*each("micro_batch"), ZLoss(coef=1.0), LocalEntropyLoss(coef=1.0)]


def run(*losses, padded=False):
    """Meetings, the losses of a counting router, and those of a router alone."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(12, 5, generator=generator)
    padding_mask = torch.arange(12) % 5 == 0 if padded else None
    router = TopKRouter(5, 8, 2, losses=losses).train()
    found = []
    for population in (Counting(), Alone()):
        router.population = population
        router.zero_grad()
        routing = router(x_TD, sequence_length=4, padding_mask=padding_mask)
        sum(routing.losses.values()).backward()
        values = {name: loss.detach() for name, loss in routing.losses.items()}
        found.append((values, router.weight_ED.grad))
        if isinstance(population, Counting):
            meetings = population.meetings
    (told, grad), (alone, grad_alone) = found
    torch.testing.assert_close(told, alone)
    torch.testing.assert_close(grad, grad_alone)
    return meetings


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("loss", OVER_TOKENS)
def test_a_loss_asks_once(loss, padded):
    assert run(loss, padded=padded) == 1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("loss", each("sequence"))
def test_a_mean_over_sequences_asks_once_more(loss, padded):
    assert run(loss, padded=padded) == 2


@pytest.mark.parametrize("losses", [(0, 1), (1, 0)])
def test_a_second_loss_asks_once_whichever_comes_first(losses):
    pair = (LoadBalancingLoss(coef=1.0), ZLoss(coef=1.0))
    assert run(*(pair[place] for place in losses)) == 2
