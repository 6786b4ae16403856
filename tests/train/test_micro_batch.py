"""The ranks' parts of a batch are, together, the batch. No process takes part."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.dispatch.collectives import Group, own_range
from expertmesh.parallel.grid import Grid
from expertmesh.random import RandomKey
from expertmesh.train.micro_batch import MicroBatch, micro_batches, num_tokens

CPU = torch.device("cpu")


class Place:
    """The part of a mesh that cutting a batch asks for, seen from one rank."""

    def __init__(self, grid: Grid, rank: int) -> None:
        self.grid, self.rank = grid, rank

    def degree(self, axis: str) -> int:
        return self.grid.degrees[axis]

    def group(self, axes: str | Sequence[str]) -> Group:
        ranks = tuple(self.grid.group_of(self.rank, axes))
        return Group(ranks, ranks.index(self.rank), None)


def own_part(place: Place) -> Callable[[Tensor, int], Tensor]:
    """As a tensor-parallel model answers."""

    def part(x: Tensor, dim: int) -> Tensor:
        start, stop = own_range(x.shape[dim], place.group("tp"))
        return x.narrow(dim, start, stop - start)

    return part


def batch_of(rows: int, seq_len: int, lengths: list[int] | None) -> Batch:
    """Every token and target tells its index."""
    tokens_BS = torch.arange(rows * seq_len).view(rows, seq_len)
    padding = None
    targets_BS = tokens_BS + 1000
    if lengths is not None:
        padding = torch.arange(seq_len) >= torch.tensor(lengths)[:, None]
        targets_BS = targets_BS.masked_fill(padding, IGNORE)
    return Batch(tokens_BS, targets_BS, padding, torch.arange(rows))


def parts_of(batch: Batch, sequences: int, place: Place) -> list[MicroBatch]:
    mesh: Any = place
    part = own_part(place) if place.degree("tp") > 1 else None
    return list(micro_batches(batch, sequences, CPU, mesh, part))


@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=60)
def test_every_token_is_one_ranks(data: st.DataObject, dp: int, cp: int, tp: int) -> None:
    rows, seq_len = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 9))
    sequences = data.draw(st.integers(1, 8))
    lengths = data.draw(st.none() | st.lists(st.integers(0, seq_len), min_size=rows, max_size=rows))
    batch = batch_of(rows, seq_len, lengths)
    if num_tokens(batch) == 0:
        return
    world = dp * cp * tp
    grid = Grid.infer(world, dp=dp, cp=cp, tp=tp)
    by_rank = [parts_of(batch, sequences, Place(grid, rank)) for rank in range(world)]
    whole = list(micro_batches(batch, sequences, CPU))
    assert {len(parts) for parts in by_rank} == {len(whole)} == {-(-rows // sequences)}
    for place, expected in enumerate(whole):
        views = [parts[place] for parts in by_rank]
        index_N = torch.cat([view.token_index_BS.flatten() for view in views])
        targets_N = torch.cat([view.targets_BS.flatten() for view in views])
        order_N = index_N.argsort()
        assert torch.equal(index_N[order_N], expected.token_index_BS.flatten())
        assert torch.equal(targets_N[order_N], expected.targets_BS.flatten())
        assert {view.share for view in views} == {expected.share}
        for view in views:
            # What a rank predicts is of positions whose attention it takes part in.
            assert set(view.token_index_BS.flatten().tolist()) <= set(
                view.tokens_BS.flatten().tolist()
            )
    assert sum(part.share for part in whole) == pytest.approx(1.0)


def test_slices_of_one_sequence_know_what_is_before_them() -> None:
    batch = batch_of(2, 7, [7, 3])
    grid = Grid.infer(2, dp=1, cp=2)
    (first,), (second,) = (parts_of(batch, 2, Place(grid, rank)) for rank in range(2))
    assert first.tokens_BS.tolist() == [[0, 1, 2, 3], [7, 8, 9, 10]]
    assert second.tokens_BS.tolist() == [[4, 5, 6], [11, 12, 13]]
    assert first.cache is not None
    assert second.cache is not None
    assert (first.cache.get_seq_length(), second.cache.get_seq_length()) == (0, 4)
    # Padding is told from the sequence's start up to the slice's end.
    assert first.padding_mask_BS is not None
    assert first.padding_mask_BS.tolist() == [[False] * 4, [False] * 3 + [True]]
    assert second.padding_mask_BS is not None
    assert second.padding_mask_BS.tolist() == [[False] * 7, [False] * 3 + [True] * 4]


def test_ranks_of_tp_see_the_whole_slice_and_answer_for_their_part() -> None:
    batch = batch_of(1, 5, None)
    grid = Grid.infer(2, dp=1, tp=2)
    (first,), (second,) = (parts_of(batch, 1, Place(grid, rank)) for rank in range(2))
    assert torch.equal(first.tokens_BS, batch.tokens_BS)
    assert torch.equal(second.tokens_BS, batch.tokens_BS)
    assert first.token_index_BS.tolist() == [[0, 1, 2]]
    assert second.targets_BS.tolist() == [[1003, 1004]]


def test_rows_that_are_fewer_than_ranks_leave_some_without() -> None:
    batch = batch_of(3, 2, None)
    grid = Grid.infer(4)
    found = [parts_of(batch, 2, Place(grid, rank)) for rank in range(4)]
    assert [[len(part.tokens_BS) for part in parts] for parts in found] == [
        [1, 1], [1, 0], [0, 0], [0, 0],
    ]  # fmt: skip
    assert found[3][0].tokens_BS.shape == (0, 2)


def test_a_mask_without_padding_is_not_given() -> None:
    parts = list(micro_batches(batch_of(4, 3, [3, 3, 1, 3]), 2, CPU))
    assert parts[0].padding_mask_BS is None
    assert parts[1].padding_mask_BS is not None
    assert [part.share for part in parts] == pytest.approx([6 / 10, 4 / 10])
    arguments = parts[1].arguments(seed=3, step=8)
    expected = RandomKey.of(3, 8, parts[1].token_index_BS)
    assert arguments["padding_mask"] is parts[1].padding_mask_BS
    assert arguments["key"].token_index is parts[1].token_index_BS
    assert torch.equal(arguments["key"].seed, expected.seed)
    assert arguments["cache"] is None


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 0, 1], [0, 1, 1]], True),
        ([[0, 0, 0], [1, 1, 1]], True),
        ([[1, 0, 0], [0, 0, 1]], False),
        ([[0, 1, 0]], False),
    ],
)
def test_padding_that_only_follows_is_known_as_such(rows: list[list[int]], expected: bool) -> None:
    mask = torch.tensor(rows, dtype=torch.bool)
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    batch = Batch(tokens, tokens, mask, torch.arange(len(rows)))
    (part,) = micro_batches(batch, len(rows), torch.device("cpu"))
    assert part.arguments(0, 0)["padded_at_end"] is expected
