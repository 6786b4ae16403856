from itertools import islice

import numpy as np
import pytest
import torch

from expertmesh.data.loader import Loader, in_order
from expertmesh.data.packing import DocumentDataset
from expertmesh.data.tokens import TokenStream
from expertmesh.errors import UserError


def index(loader, steps):
    return torch.cat([loader.batch(step).sample_index_B for step in steps]).tolist()


def test_each_sample_once_per_epoch(numbers):
    loader = Loader(numbers(12), batch_size=4, seed=0)
    epochs = [index(loader, range(3 * e, 3 * e + 3)) for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("batch_size", [1, 5, 7, 12, 30])
def test_the_order_does_not_depend_on_the_batch_size(numbers, batch_size):
    """A batch may span epochs, and even hold several."""
    loader = Loader(numbers(12), batch_size=batch_size, seed=0)
    places = index(loader, range(60 // batch_size + 1))[:60]
    assert places == index(Loader(numbers(12), batch_size=60, seed=0), [0])


def test_a_batch_that_no_machine_holds_is_refused_at_once(numbers):
    Loader(numbers(12), batch_size=10**4, seed=0)
    with pytest.raises(
        UserError, match=r"100,000,000,000 sequences of .* set a lower train\.batch"
    ):
        Loader(numbers(12), batch_size=10**11, seed=0)


def test_a_batch_is_a_pure_function_of_the_step(numbers):
    whole = list(islice(Loader(numbers(10), batch_size=3, seed=4).batches(), 20))
    resumed = list(islice(Loader(numbers(10), batch_size=3, seed=4).batches(13), 7))
    for a, b in zip(whole[13:], resumed, strict=True):
        assert torch.equal(a.tokens_BS, b.tokens_BS)
        assert torch.equal(a.targets_BS, b.targets_BS)
        assert torch.equal(a.sample_index_B, b.sample_index_B)


def test_global_generators_are_neither_read_nor_moved(numbers):
    torch.manual_seed(0)
    np.random.seed(0)
    first = Loader(numbers(10), batch_size=10, seed=4).batch(0)
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    second = Loader(numbers(10), batch_size=10, seed=4).batch(0)
    assert torch.equal(first.sample_index_B, second.sample_index_B)
    assert torch.equal(torch.rand(1), expected)


def test_another_seed_is_another_order(numbers):
    a, b = (Loader(numbers(50), batch_size=50, seed=seed) for seed in (0, 1))
    assert index(a, [0]) != index(b, [0])


def test_a_packed_batch_has_no_mask(numbers):
    batch = Loader(numbers(10, seq_len=3), batch_size=4, seed=0).batch(0)
    assert batch.padding_mask_BS is None
    assert batch.tokens_BS.shape == batch.targets_BS.shape == (4, 3)
    assert batch.tokens_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert torch.equal(batch.tokens_BS[:, 0], batch.sample_index_B)
    assert batch.num_targets == 12


def test_the_mask_marks_what_has_no_target():
    stream = TokenStream(
        np.asarray([1, 2, 9, 3, 9, 4, 5, 6, 9], np.uint16), np.asarray([0, 3, 5, 9])
    )
    (batch,) = in_order(DocumentDataset(stream, 3, pad_id=0), 4)
    assert batch.tokens_BS.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert batch.padding_mask_BS.tolist() == [
        [False, False, True],
        [False, True, True],
        [False] * 3,
    ]
    assert torch.equal(batch.targets_BS == -100, batch.padding_mask_BS)
    assert batch.num_targets == 6
    part = batch.rows(1, 3)
    assert part.sample_index_B.tolist() == [1, 2]
    assert part.padding_mask_BS.tolist() == batch.padding_mask_BS[1:3].tolist()
    assert part.num_targets == 4


def test_in_order_shows_each_sample_once(numbers):
    batches = list(in_order(numbers(7), 3))
    assert [len(batch.tokens_BS) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.sample_index_B for batch in batches]).tolist() == list(range(7))


def test_refusals(numbers):
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        Loader(numbers(3), batch_size=0, seed=0)
    with pytest.raises(UserError, match="has no sample"):
        Loader(numbers(0), batch_size=1, seed=0)
    with pytest.raises(UserError, match="step must be at least 0, got -1"):
        Loader(numbers(3), batch_size=1, seed=0).batch(-1)


@pytest.mark.parametrize(
    ("length", "batch_size", "epochs", "steps"),
    [(12, 4, 1, 3), (12, 5, 1, 3), (12, 5, 2, 5), (12, 4, 0.5, 2), (1, 8, 1, 1), (10, 1, 1.1, 11)],
)
def test_epochs_as_steps(numbers, length, batch_size, epochs, steps):
    loader = Loader(numbers(length), batch_size=batch_size, seed=0)
    assert loader.steps(epochs) == steps
    assert loader.epoch(steps) >= epochs > loader.epoch(steps - 1)


@pytest.mark.parametrize("epochs", [0, -1, float("inf"), float("nan")])
def test_epochs_must_be_positive(numbers, epochs):
    with pytest.raises(UserError, match="epochs must be a positive number"):
        Loader(numbers(4), batch_size=2, seed=0).steps(epochs)
