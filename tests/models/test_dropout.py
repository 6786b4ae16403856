"""Dropout is a function of seed, step, layer, token and channel."""

import pytest
import torch

from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.dropout import Dropout
from expertmesh.random import RandomKey

INDEX = torch.arange(24).view(4, 6)


def key(step: int = 1, index: torch.Tensor = INDEX) -> RandomKey:
    return RandomKey.of(0, step, index)


def test_a_part_drops_what_the_whole_drops() -> None:
    drop = Dropout(0.3, layer=2, name="moe")
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    whole = drop(x, key())
    part = drop(x[1:3, 2:], key(index=INDEX[1:3, 2:]))
    assert torch.equal(part, whole[1:3, 2:])


def test_rate_scale_and_independence() -> None:
    x = torch.ones(50, 40, 16)
    index = torch.arange(2000).view(50, 40)
    one = Dropout(0.25, layer=0, name="moe")(x, key(index=index))
    assert one.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (one == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    others = [
        Dropout(0.25, layer=1, name="moe")(x, key(index=index)),
        Dropout(0.25, layer=0, name="attention")(x, key(index=index)),
        Dropout(0.25, layer=0, name="moe")(x, key(2, index)),
    ]
    for other in others:
        both = ((one == 0) & (other == 0)).float().mean()
        assert both == pytest.approx(0.25**2, abs=0.01)


def test_nothing_in_evaluation_and_at_zero() -> None:
    x = torch.randn(4, 6, 8)
    assert Dropout(0.5, layer=0, name="moe").eval()(x, key()) is x
    assert Dropout(0.0, layer=0, name="moe")(x, key()) is x


@pytest.mark.parametrize("with_key", [True, False])
def test_recompute_drops_the_same(with_key: bool) -> None:
    config = DecoderConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, dropout=0.4,
        num_experts=4, experts_per_token=2, expert_hidden=8,
    )  # fmt: skip
    tokens = torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(1))
    gradients = []
    for recompute in (False, True):
        model = DecoderLM(config, seed=0).double()
        if recompute:
            model.checkpoint_blocks()
        torch.manual_seed(5)
        model(tokens, key=key() if with_key else None).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_impossible_rates_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
        DecoderConfig(vocab_size=8, dim=8, num_layers=1, num_heads=1, dense_hidden=8, dropout=p)
