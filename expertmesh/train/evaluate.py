"""Held-out loss."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from expertmesh.data import Batch, Dataset, Tokenizer, in_order
from expertmesh.data.loader import collate
from expertmesh.errors import UserError
from expertmesh.train.passes import Passes


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out text.

    Attributes:
        nats: Sum of the token losses.
        num_targets: Tokens predicted.
        num_bytes: Bytes of text among them; None where tokens are not bytes.
    """

    nats: float
    num_targets: int
    num_bytes: int | None

    @property
    def loss(self) -> float:
        """Mean loss of a token, nats."""
        return self.nats / self.num_targets

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed for a byte of text; None where tokens are not bytes."""
        return self.nats / math.log(2.0) / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates on samples spread evenly over a held-out split, the same ones each time.

    Attributes:
        dataset: The held-out samples.
        batch: Sequences of a batch.
        batches: Batches to read; None reads them all.
        tokenizer: Says which tokens are bytes.
    """

    dataset: Dataset
    batch: int
    batches: int | None
    tokenizer: Tokenizer

    def __call__(self, passes: Passes) -> Evaluation:
        """Mean loss over the target tokens; the model's mode is as before afterwards.

        Args:
            passes: How the model runs over a batch; on a mesh all ranks call together.

        Raises:
            UserError: If there is nothing to predict.
        """
        model = passes.model
        training = model.training
        model.eval()
        try:
            nats, num_targets, num_bytes = 0.0, 0, 0
            for batch in self._batches():
                nats += passes.nats(batch)
                num_targets += batch.num_targets
                num_bytes += int(((batch.targets_BS >= 0) & (batch.targets_BS < 256)).sum())
        finally:
            model.train(training)
        if num_targets == 0:
            raise UserError("the held-out split has no token to predict; give it more text")
        is_bytes = self.tokenizer.identity == "byte"
        return Evaluation(nats, num_targets, num_bytes if is_bytes else None)

    def _batches(self) -> Iterator[Batch]:
        if self.batches is None:
            yield from in_order(self.dataset, self.batch)
            return
        num_samples = min(len(self.dataset), self.batches * self.batch)
        # Spread, not the first ones: those may all be of one document.
        chosen = [i * len(self.dataset) // num_samples for i in range(num_samples)]
        for start in range(0, num_samples, self.batch):
            yield collate(self.dataset, chosen[start : start + self.batch])
