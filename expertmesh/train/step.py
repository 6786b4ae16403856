"""One optimizer step: micro-batches, one loss, one update.

The loss of a step is the sum of its token losses over the number of its target tokens, however
the step is cut into micro-batches and however much of it is padding.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.errors import UserError
from expertmesh.layer import set_loss_scale
from expertmesh.random import RandomKey
from expertmesh.routing import update_selection_bias
from expertmesh.train.precision import Precision

# Below this the scale has been halved 30 times in a row: no scale helps.
_SMALLEST_SCALE = 2.0**-14


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was.

    Attributes:
        loss: Mean over the step's target tokens, in nats; balance losses are not in it.
        grad_norm: Global norm before clipping; None where the step was skipped.
        num_tokens: Tokens that are not padding.
    """

    loss: float
    grad_norm: float | None
    num_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """A slice of a step's batch, on the device.

    Attributes:
        tokens_BS: Input tokens.
        targets_BS: What each position should predict; ``IGNORE`` where nothing.
        padding_mask_BS: True at padding; None if there is none.
        token_index_BS: Each token's index in the step's whole batch.
        share: This slice's part of the step's tokens that are not padding.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    padding_mask_BS: Tensor | None
    token_index_BS: Tensor
    share: float


def micro_batches(batch: Batch, sequences: int, device: torch.device) -> Iterator[MicroBatch]:
    """Cut a step's batch into slices of ``sequences`` rows; the last may be smaller."""
    num_rows, seq_len = batch.tokens_BS.shape
    index_BS = torch.arange(num_rows * seq_len).view(num_rows, seq_len)
    whole = num_tokens(batch)
    for start in range(0, num_rows, sequences):
        part = batch.rows(start, start + sequences)
        mask = part.padding_mask_BS
        # Attention needs no stored mask where nothing is padding, so such a mask is not given.
        padding = None if mask is None or not bool(mask.any()) else mask.to(device)
        yield MicroBatch(
            tokens_BS=part.tokens_BS.to(device),
            targets_BS=part.targets_BS.to(device),
            padding_mask_BS=padding,
            token_index_BS=index_BS[start : start + sequences].to(device),
            share=num_tokens(part) / whole,
        )


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.padding_mask_BS
    return batch.tokens_BS.numel() - (0 if mask is None else int(mask.sum()))


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Sum of the cross entropies of the target tokens, in nats, in float32 or wider."""
    wide = logits_BSV if logits_BSV.dtype == torch.float64 else logits_BSV.float()
    return F.cross_entropy(
        wide.flatten(0, 1), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum"
    )


class Stepper:
    """Takes optimizer steps.

    Args:
        model: Called as ``model(tokens, padding_mask=, key=)``; its MoE layers are told the loss
            scale and update their selection bias.
        optimizer: Over the model's parameters.
        precision: Autocast and loss scale.
        device: Where the parameters are.
        seed: The run's; with step and token it decides routing noise.
        sequences: Rows of one forward pass.
        clip: Largest global gradient norm; 0 does not clip.
        forward: Stands for ``model`` in the forward pass, for example its compiled form.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        device: torch.device,
        seed: int,
        sequences: int,
        clip: float,
        forward: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.precision = precision
        self.device = device
        self.seed = seed
        self.sequences = sequences
        self.clip = clip
        self.forward = model if forward is None else forward
        self.scaler = precision.scaler(device)

    def step(self, step: int, batch: Batch) -> StepResult:
        """One optimizer step.

        Args:
            step: Its number; names the random numbers, and the errors.
            batch: The step's whole batch, on the host.

        Raises:
            UserError: If the batch holds no target, or the loss or gradient is not finite. The
                parameters are then as they were before the step.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(step, batch)
        if not math.isfinite(loss):
            raise UserError(_not_finite("loss", loss, step))
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        skipped = not math.isfinite(norm)
        if skipped and not self.scaler.is_enabled():
            raise UserError(_not_finite("norm of the gradient", norm, step))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise UserError(
                f"the gradient overflows float16 at every loss scale, at step {step}; "
                'set train.precision = "bf16" or "fp32", or a lower optim.lr'
            )
        update_selection_bias(self.model)
        return StepResult(loss, None if skipped else norm, num_tokens(batch))

    def accumulate(self, step: int, batch: Batch) -> float:
        """Add the gradient of the whole step's loss, times the loss scale; returns the loss."""
        num_targets = batch.num_targets
        if num_targets == 0:
            kind = "is empty" if batch.targets_BS.numel() == 0 else "is all padding"
            raise UserError(
                f"the batch of step {step} {kind}: it has no token to predict; "
                "check the data, and data.seq_len against its documents"
            )
        # GradScaler does not know the losses that MoE layers attach: they carry the scale too.
        scale = self.scaler.get_scale()
        total = torch.zeros((), device=self.device)
        for part in micro_batches(batch, self.sequences, self.device):
            set_loss_scale(self.model, scale * part.share)
            with self.precision.autocast(self.device):
                logits_BSV = self.forward(
                    part.tokens_BS,
                    padding_mask=part.padding_mask_BS,
                    key=RandomKey.of(self.seed, step, part.token_index_BS),
                )
            loss = token_loss(logits_BSV, part.targets_BS) / num_targets
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return float(total)

    def _clip(self) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        return float(norm)


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse a model with a weight that is not finite, naming the first one.

    Raises:
        UserError: If there is one.
    """
    for name, param in model.named_parameters():
        if not bool(param.detach().isfinite().all()):
            raise UserError(
                f"{name} is not finite after step {step}; nothing was saved; set a lower optim.lr "
                "and start again: the run continues from its last checkpoint"
            )


def _not_finite(what: str, value: float, step: int) -> str:
    return (
        f"the {what} is {value} at step {step}; the step was not taken and nothing was saved; "
        "set a lower optim.lr or optim.clip, or more optim.warmup_steps, and start again: "
        "the run continues from its last checkpoint"
    )
