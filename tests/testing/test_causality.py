"""The probe itself, on modules whose answer is known."""

import pytest
import torch
from torch import nn

from expertmesh.errors import UserError
from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.routing import Capacity, NormalNoise, TopKRouter, ZLoss
from expertmesh.soft_moe import SoftMoE
from expertmesh.testing import is_causal


class Through(nn.Module):
    """A function of ``(B, S, D)`` or ids as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, **others):
        return self.function(x, **others)


def numbers():
    return torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "causal"),
    [
        (torch.sin, True),
        (lambda x: x.cumsum(1), True),
        (lambda x: (x.cumsum(1), "anything"), True),
        (lambda x: x - x.mean(1, keepdim=True), False),
        (lambda x: x.flip(1).cumsum(1).flip(1), False),
        (lambda x: x.roll(-1, 1), False),
        (lambda x: x + 1e-6 * x[:, -1:], False),
        (lambda x: x + x.cummax(1).values, True),
        (lambda x: torch.where(x.amax((1, 2), keepdim=True) > 4, x, 0 * x), False),
    ],
)
def test_functions_of_numbers(function, causal):
    assert is_causal(Through(function), numbers()) == causal


@pytest.mark.parametrize(
    "function", [lambda x: x.sum(0, keepdim=True) + 0 * x, lambda x: x.sort(0)[0]]
)
def test_what_other_sequences_do_at_the_same_place_does_not_count(function):
    assert is_causal(Through(function), numbers())


def test_attention_with_and_without_a_mask():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    masked = Through(lambda x: attention.double()(x, x, x, attn_mask=mask, need_weights=False))
    open_ = Through(lambda x: attention.double()(x, x, x, need_weights=False))
    assert is_causal(masked, numbers())
    assert not is_causal(open_, numbers())


def test_ids_and_further_inputs_change_together():
    ids = torch.arange(12).view(2, 6)
    assert is_causal(Through(lambda x: x.cumsum(1)), ids)
    assert not is_causal(Through(lambda x: x.flip(1)), ids)
    x = torch.randn(2, 6, 3)
    follows = Through(lambda x, token_ids: x + token_ids.cumsum(1)[..., None])
    foresees = Through(lambda x, token_ids: x + token_ids.sum(1)[..., None, None])
    assert is_causal(follows, x, token_ids=ids)
    assert not is_causal(foresees, x, token_ids=ids)
    padded = torch.zeros(2, 6, dtype=torch.bool)
    seen = Through(lambda x, padding_mask: x.masked_fill(padding_mask[..., None], 0.0))
    assert is_causal(seen, x, padding_mask=padded)


def moe(**options):
    experts = MLPExperts(8, 12, 4, init_std=0.5, seed=0)
    return MoE(TopKRouter(8, 4, 2, init_std=1.0, seed=0, **options), experts)


def test_an_example_is_made_for_what_has_a_width():
    assert not is_causal(SoftMoE(MLPExperts(8, 12, 4, seed=0), 2, seed=0))


def test_random_numbers_and_balance_losses_are_no_leaks():
    layer = moe(noise=NormalNoise(1.0), losses=(ZLoss(coef=1.0),))
    assert is_causal(layer, training=True)
    assert is_causal(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)), numbers(), training=True)


def test_the_mode_decides_where_only_training_drops():
    layer = moe(capacity=Capacity(factor=0.6, order="priority"))
    assert not is_causal(layer, training=True)
    assert is_causal(layer)


def test_the_module_is_left_as_it_was():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    module, layer = Counts(), moe().eval()
    assert is_causal(module, numbers(), training=True)
    assert module.calls == 0
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    is_causal(layer, training=True)
    assert torch.equal(torch.rand(1), expected)
    assert layer.metrics()["tokens"].value == 0
    assert not layer.training
    assert layer.router.weight_ED.dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (None, {}, "x must be given for a Through"),
        (torch.zeros(4, 3), {}, "x must be"),
        (torch.zeros(2, 1, 3), {}, "S >= 2"),
        (torch.zeros(2, 4, 3), {"tries": 0}, "tries must be at least 1"),
        (torch.zeros(2, 4, 3), {"token_ids": torch.zeros(8)}, "token_ids must begin with"),
        (torch.full((2, 4, 3), torch.nan), {}, "must be finite"),
    ],
)
def test_what_cannot_be_probed(x, options, message):
    with pytest.raises(UserError, match=message):
        is_causal(Through(lambda x, **others: x), x, **options)


def test_an_answer_of_another_shape_is_refused():
    with pytest.raises(UserError, match="must answer with"):
        is_causal(Through(lambda x: x.flatten(0, 1)), numbers())
