import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from expertmesh.data.dataset import IGNORE, Dataset, Sample
from expertmesh.data.tokenizer import ByteTokenizer
from expertmesh.errors import UserError
from expertmesh.kernels.cross_entropy import token_loss
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.train.evaluate import Evaluation, Evaluator
from expertmesh.train.passes import OneByOne
from expertmesh.train.precision import Precision
from tests.train.tiny import MODEL

CPU = torch.device("cpu")


class Rows(Dataset):
    """Samples of 8 tokens; sample i is padded from i + 2 on."""

    seq_len = 8
    packed = False

    def __init__(self, num_samples: int) -> None:
        generator = np.random.default_rng(0)
        self.tokens: NDArray[np.int64] = generator.integers(0, 257, (num_samples, 9))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        row, length = self.tokens[index], min(index + 2, 8)
        targets = np.where(np.arange(8) < length, row[1:], IGNORE)
        return Sample(row[:-1], targets, length)


def make_evaluator(num_samples: int = 6, **options: int | None) -> Evaluator:
    values: dict[str, int | None] = {"batch": 4, "batches": None, **options}
    return Evaluator(
        dataset=Rows(num_samples),
        tokenizer=ByteTokenizer(),
        **values,  # type: ignore[arg-type]  # from a dict
    )


def over(model: DecoderLM, sequences: int = 2) -> OneByOne:
    return OneByOne(model, precision=Precision("fp32"), device=CPU, sequences=sequences)


def make_model(**overrides: object) -> DecoderLM:
    return DecoderLM(DecoderConfig(**{**MODEL, **overrides}), seed=2)


def test_loss_is_the_mean_over_targets_whatever_the_batch() -> None:
    model = make_model().train()
    one = make_evaluator()(over(model))
    two = make_evaluator(batch=3)(over(model, 3))
    assert model.training
    assert one.num_targets == sum(range(2, 8))
    assert one.loss == pytest.approx(two.loss, rel=1e-6)

    rows = Rows(6)
    model.eval()
    nats = 0.0
    for i in range(6):
        sample = rows[i]
        tokens = torch.from_numpy(sample.tokens_S[: sample.num_tokens])[None]
        targets = torch.from_numpy(sample.targets_S[: sample.num_tokens])[None]
        nats += token_loss(model(tokens), targets).item()
    assert one.nats == pytest.approx(nats, rel=1e-5)


def test_numbers_of_an_evaluation() -> None:
    evaluation = Evaluation(nats=20.0, num_targets=10, num_bytes=8)
    assert evaluation.loss == 2.0
    assert evaluation.perplexity == pytest.approx(math.exp(2.0))
    assert evaluation.bits_per_byte == pytest.approx(20.0 / math.log(2.0) / 8)
    assert Evaluation(1.0, 1, None).bits_per_byte is None
    assert Evaluation(1e6, 1, None).perplexity == math.inf


def test_only_bytes_count_as_bytes() -> None:
    evaluator = make_evaluator()
    rows = [evaluator.dataset[i].targets_S for i in range(6)]
    expected = sum(int(((row >= 0) & (row < 256)).sum()) for row in rows)
    assert evaluator(over(make_model())).num_bytes == expected


def test_bounded_batches_are_spread_over_the_split() -> None:
    # Samples 0, 1, 3 and 4 of 6.
    assert make_evaluator(batches=1)(over(make_model())).num_targets == 2 + 3 + 5 + 6
    assert make_evaluator(batches=99)(over(make_model())).num_targets == sum(range(2, 8))


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(UserError, match="no token to predict"):
        make_evaluator(0)(over(make_model()))
