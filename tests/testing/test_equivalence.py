from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertmesh.shards import Shard
from expertmesh.testing.equivalence import (
    COLUMNS,
    RankView,
    Watch,
    assemble,
    by_name,
    errors,
    join,
    pieces,
    rows,
    worst,
)

WHOLE = torch.arange(12.0, dtype=torch.float64).view(4, 3)


def top(tensor: Tensor = WHOLE) -> Shard:
    return Shard(tensor[:2].clone(), tuple(tensor.shape), (0, 0))


def bottom(tensor: Tensor = WHOLE) -> Shard:
    return Shard(tensor[2:].clone(), tuple(tensor.shape), (2, 0))


def view(tokens: list[int], **changes: Any) -> RankView:
    index_T = torch.tensor(tokens, dtype=torch.int64)
    values_TD = index_T[:, None].double() + torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    fields: dict[str, Any] = {
        "outputs": [(index_T, values_TD)],
        "input_gradients": [(index_T, -values_TD)],
        "gradients": {"w": Shard(WHOLE, (4, 3), (0, 0))},
        "norms": [2.0, 1.0],
        "losses": [5.0, 4.0],
        "parameters": {"w": Shard(WHOLE, (4, 3), (0, 0))},
    }
    return RankView(**{**fields, **changes})


def test_pieces_make_the_whole() -> None:
    got = assemble([{"w": top(), "b": Shard(torch.ones(()), (), ())}, {"w": bottom()}])
    assert torch.equal(got["w"], WHOLE)
    assert got["b"] == 1


def test_copies_must_agree_to_the_bit() -> None:
    other = WHOLE.clone()
    other[0, 0] = 1e-300
    assemble([{"w": top()}, {"w": bottom()}, {"w": top()}])
    with pytest.raises(AssertionError, match="w on rank 2 differs"):
        assemble([{"w": top()}, {"w": bottom()}, {"w": top(other)}])


def test_an_element_that_nobody_holds_is_missed() -> None:
    with pytest.raises(AssertionError, match="w: no rank holds 6 of 12 elements"):
        assemble([{"w": top()}, {"w": top()}])


def test_pieces_of_plain_tensors_are_copies() -> None:
    weight = torch.zeros(2)
    held = pieces([("weight", weight)])
    weight.fill_(1)
    assert held["weight"].local.tolist() == [0, 0]
    assert held["weight"].shape == (2,)


def test_ranks_together_see_each_token_once() -> None:
    seen = join([view([3, 0]), view([2]), view([1]), view([])], 4)
    assert torch.equal(seen.output_TV[:, 0], torch.arange(1.0, 5.0).double())
    assert torch.equal(seen.input_gradient_TD, -seen.output_TV)
    with pytest.raises(AssertionError, match=r"how many did: \{1: 0, 2: 2\}"):
        join([view([0, 2]), view([2, 3])], 4)


def test_ranks_must_report_the_same_losses() -> None:
    with pytest.raises(AssertionError, match="rank 1 has other losses"):
        join([view([0]), view([1], losses=[5.0, 4.0 + 1e-12])], 2)


def test_errors_are_relative_and_by_kind() -> None:
    expected = join([view([0, 1])], 2)
    assert errors(expected, expected) == dict.fromkeys(COLUMNS, 0.0)
    half = {"w": Shard(WHOLE * 1.5, (4, 3), (0, 0))}
    found = errors(join([view([0, 1], gradients=half, losses=[5.0, 4.4])], 2), expected)
    assert found["parameter gradients"] == pytest.approx(0.5)
    assert found["losses"] == pytest.approx(0.4 / 41**0.5)
    assert found["output"] == found["parameters"] == found["gradient norms"] == 0


def test_a_number_that_is_none_is_the_worst() -> None:
    expected = join([view([0, 1])], 2)
    nan = errors(join([view([0, 1], losses=[5.0, float("nan")])], 2), expected)
    assert nan["losses"] == float("inf")
    assert worst({"a": 1.0, "b": float("nan"), "c": 2.0}) == float("inf")


def test_nothing_is_not_equal_to_nothing() -> None:
    """Two runs whose gradients nobody noted agree about none of them."""
    unseen = join([view([0, 1], gradients={})], 2)
    with pytest.raises(AssertionError, match="there is no tensor to compare with"):
        errors(unseen, unseen)


def test_names_and_shapes_must_agree() -> None:
    with pytest.raises(AssertionError, match=r"only one of them has \['b'\]"):
        by_name({"a": WHOLE}, {"a": WHOLE, "b": WHOLE})
    with pytest.raises(AssertionError, match=r"a: shape \(3, 4\), not \(4, 3\)"):
        by_name({"a": WHOLE.T}, {"a": WHOLE})


def test_watching_keeps_outputs_and_gradients_and_leaves_no_trace() -> None:
    linear = nn.Linear(2, 2)
    with Watch(linear, "forward") as watch, Watch(None, "forward") as nobody:
        first, second = linear(torch.ones(1, 2)), linear(torch.zeros(3, 2))
        (second.sum() * 2 + first.sum() * 3).backward()
    assert [tuple(x.shape) for x in watch.outputs] == [(1, 2), (3, 2)]
    assert watch.gradients[0].tolist() == [[3.0, 3.0]]
    assert watch.gradients[1].unique().tolist() == [2.0]
    assert "forward" not in vars(linear)
    assert nobody.outputs == []


def test_rows_pair_tokens_with_values() -> None:
    ((index_T, values_TD),) = rows([torch.tensor([[4, 5]])], [torch.ones(1, 2, 3)])
    assert index_T.tolist() == [4, 5]
    assert values_TD.shape == (2, 3)
    (empty,) = rows([torch.empty(0, 2, dtype=torch.int64)], [torch.ones(0, 2, 3)])
    assert empty[1].shape == (0, 3)
