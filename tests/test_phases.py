import time

import torch
from torch import nn

import expertmesh as em
from expertmesh.dispatch import LocalDispatcher


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


def make():
    experts = em.GatedMLPExperts(dim=8, hidden=16, num_experts=4)
    return em.MoE(em.TopKRouter(8, 4, 2), experts, shared=Slow())


def test_each_phase_of_each_layer_is_timed():
    model = nn.Sequential(make(), make())
    with em.time_phases(model) as times:
        model(torch.randn(3, 8))
        model(torch.randn(3, 8)).sum().backward()
    milliseconds = times.milliseconds()
    assert list(milliseconds) == ["0", "1"]
    for phases in milliseconds.values():
        assert set(phases) == {"route", "dispatch", "experts", "combine", "shared"}
        assert all(value >= 0 for value in phases.values())
        # Milliseconds, not microseconds; a busy machine sleeps longer than it was told to.
        assert 20 <= phases["shared"] < 20_000


def test_the_layer_is_as_before_once_the_context_is_closed():
    moe = make()
    x = torch.randn(3, 8)
    expected = moe(x)
    with em.time_phases(moe) as times:
        assert torch.equal(moe(x), expected)
    before = times.milliseconds()
    assert isinstance(moe.dispatcher, LocalDispatcher)
    moe(x)
    assert times.milliseconds() == before
