"""How a model runs over the micro-batches of a step: one after another, or through a pipeline."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from expertmesh.data import Batch
from expertmesh.errors import UserError
from expertmesh.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from expertmesh.layer import set_loss_scale
from expertmesh.train.micro_batch import MicroBatch, micro_batches
from expertmesh.train.precision import Precision

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh
    from expertmesh.parallel.pipeline import Pipeline


PLAIN = CrossEntropy()
"""What evaluation measures, whatever is trained: nats of the target token."""


class Passes(ABC):
    """Forward and backward passes over the micro-batches of one batch.

    Args:
        model: Holds the parameters; its MoE layers are told the loss scale. It is given ``output``
            as ``DecoderLM.forward`` is.
        precision: Autocast.
        device: Where the parameters are.
        sequences: Rows of a micro-batch, on the whole mesh.
        mesh: This rank's place; None is one process.
        loss: What a token's loss is in training.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: Precision,
        device: torch.device,
        sequences: int,
        mesh: "Mesh | None" = None,
        loss: CrossEntropy = PLAIN,
    ) -> None:
        self.model = model
        self.precision = precision
        self.device = device
        self.sequences = sequences
        self.mesh = mesh
        self.loss = loss

    @abstractmethod
    def backward(self, batch: Batch, *, seed: int, step: int, scale: float) -> Tensor:
        """Add the gradient of the batch's mean loss, times ``scale``.

        Args:
            batch: The whole batch, the same on every rank; it has targets.
            seed: Of the run; with step and token it decides routing noise.
            step: The step's number.
            scale: The loss scale.

        Returns:
            The loss, the same on every rank.
        """

    @abstractmethod
    def nats(self, batch: Batch) -> float:
        """The summed cross entropies of a batch, without gradients; the same on every rank.

        Neither smoothing nor z-loss is in them.
        """

    def parts(self, batch: Batch) -> Iterator[MicroBatch]:
        """What this rank computes of each micro-batch."""
        own_part = None if self.mesh is None else getattr(self.model, "own_part", None)
        return micro_batches(batch, self.sequences, self.device, self.mesh, own_part)

    def _everyones(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.mesh is None:
            return value
        from expertmesh.dispatch.collectives import total

        return total(value.detach(), self.mesh.everyone)


@final
class OneByOne(Passes):
    """One micro-batch after another.

    Args:
        forward: Stands for ``model`` in the forward pass, for example its compiled form.
        The others: see ``Passes``.
    """

    def __init__(
        self, model: nn.Module, *, forward: Callable[..., Tensor] | None = None, **others: Any
    ) -> None:
        super().__init__(model, **others)
        self.forward = model if forward is None else forward

    def backward(self, batch: Batch, *, seed: int, step: int, scale: float) -> Tensor:
        losses = []
        parts = list(self.parts(batch))
        for place, part in enumerate(parts):
            # A loss scale does not reach the losses that MoE layers attach: they are told it.
            set_loss_scale(self.model, scale * part.share)
            self._announce(last=place == len(parts) - 1)
            output = partial(_loss, self.loss, part.targets_BS, 1 / batch.num_targets)
            with self.precision.autocast(self.device):
                loss = self.forward(part.tokens_BS, output=output, **part.arguments(seed, step))
            (loss * scale).backward()
            losses.append(loss.detach())
        return self._everyones(sum(losses[1:], losses[0]))

    @torch.no_grad()
    def nats(self, batch: Batch) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.parts(batch):
            arguments = part.padding() if self.mesh is None else part.arguments(0, 0)
            output = partial(_loss, PLAIN, part.targets_BS, 1.0)
            with self.precision.autocast(self.device):
                total += self.model(part.tokens_BS, output=output, **arguments)
        return float(self._everyones(total))

    def _announce(self, *, last: bool) -> None:
        if self.mesh is not None:
            from expertmesh.parallel.fsdp import gradient_sync

            gradient_sync(self.model, last=last)


@final
class ThroughPipeline(Passes):
    """All micro-batches of a batch on their way through the stages at once.

    Args:
        pipeline: This rank's stages.
        The others: see ``Passes``.
    """

    def __init__(self, model: nn.Module, *, pipeline: "Pipeline", **others: Any) -> None:
        super().__init__(model, **others)
        self.pipeline = pipeline

    def backward(self, batch: Batch, *, seed: int, step: int, scale: float) -> Tensor:
        """See ``Passes.backward``.

        Raises:
            UserError: On every rank, if micro-batches have different numbers of rows: some ranks
                might find theirs alike, and wait for the others.
        """
        num_rows = len(batch.tokens_BS)
        if num_rows > self.sequences and num_rows % self.sequences:
            raise UserError(
                f"micro-batches of a pipeline must have one shape, got {num_rows} sequences in "
                f"micro-batches of {self.sequences}; set train.micro_batch to a divisor of "
                "train.batch"
            )
        pieces = self._pieces(batch, seed, step, self.loss, 1 / batch.num_targets)
        return self._everyones(self.pipeline.step(pieces, scale=scale))

    def nats(self, batch: Batch) -> float:
        pieces = self._pieces(batch, 0, 0, PLAIN, 1.0)
        parts = [self.pipeline.evaluate(piece) for piece in pieces]
        return float(self._everyones(sum(parts[1:], parts[0])))

    def _pieces(
        self, batch: Batch, seed: int, step: int, kind: CrossEntropy, weight: float
    ) -> Sequence[Any]:
        from expertmesh.parallel.pipeline import Piece

        return [
            Piece(
                tokens_BS=part.tokens_BS,
                loss=partial(_loss, kind, part.targets_BS, weight),
                share=part.share,
                arguments=part.arguments(seed, step),
            )
            for part in self.parts(batch)
        ]


def _loss(
    kind: CrossEntropy, targets_BS: Tensor, weight: float, hidden_BSD: Tensor, weight_VD: Tensor
) -> Tensor:
    return linear_cross_entropy(hidden_BSD, weight_VD, targets_BS, kind) * weight
