"""One rank's population is the identity."""

import torch

from expertmesh.random import RandomKey
from expertmesh.routing.population import Alone


def test_alone_everything_is_here() -> None:
    alone = Alone()
    value = torch.randn(6, 3, requires_grad=True)
    assert (alone.num_ranks, alone.ranks_per_sequence) == (1, 1)
    assert alone.sequence_part == (0, 1)
    assert alone.total(value, copies=5) is value
    assert alone.sequence_total(value) is value
    assert alone.for_training(value) is value


def test_alone_tokens_are_in_order_whatever_the_key_says() -> None:
    key = RandomKey.of(0, 1, torch.tensor([5, 3, 1, 4, 2, 0]))
    order = Alone().arrange(6, 3, key)
    value = torch.arange(12.0).view(6, 2)
    assert (order.num_tokens, order.sequence_length) == (6, 3)
    assert order.whole(value) is value
    assert order.own(value) is value
    assert order.group_sums(value, 3).tolist() == [[6.0, 9.0], [24.0, 27.0]]
    assert order.group_sums(value, 6).tolist() == [[30.0, 36.0]]
    assert Alone().arrange(0, None, None).group_sums(value[:0], 1).shape == (0, 2)
