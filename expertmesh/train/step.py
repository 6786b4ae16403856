"""One optimizer step: micro-batches, one loss, one update.

The loss of a step is the sum of its token losses over the number of its target tokens, however
the step is cut into micro-batches and however much of it is padding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertmesh.data import Batch
from expertmesh.errors import UserError
from expertmesh.gradients import clip_factor, gradients_of, norms, scale_
from expertmesh.routing import update_selection_bias
from expertmesh.shards import shard_of
from expertmesh.train.collector import collected_later
from expertmesh.train.micro_batch import num_tokens
from expertmesh.train.passes import Passes

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


class Stepper:
    """Takes optimizer steps.

    Args:
        passes: How the model runs over a batch; its MoE layers update their selection bias.
        optimizer: Over the model's parameters.
        seed: The run's; with step and token it decides routing noise.
        clip: Largest global gradient norm; 0 does not clip.
    """

    def __init__(
        self, passes: Passes, optimizer: torch.optim.Optimizer, *, seed: int, clip: float
    ) -> None:
        self.passes = passes
        self.model = passes.model
        self.optimizer = optimizer
        self.seed = seed
        self.clip = clip
        self.loss_scale = passes.precision.loss_scale()

    @collected_later()
    def step(self, step: int, batch: Batch) -> StepResult:
        """One optimizer step.

        Args:
            step: Its number; names the random numbers, and the errors.
            batch: The step's whole batch, on the host, the same on every rank.

        Raises:
            UserError: If the batch holds no target, or the loss or gradient is not finite. The
                parameters are then as they were before the step.
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = self.accumulate(step, batch)
        self._unscale()
        loss, norm = _read(total, self._norm())
        if not math.isfinite(loss):
            raise UserError(_not_finite("loss", loss, step))
        skipped = not math.isfinite(norm)
        if skipped and not self.loss_scale.enabled:
            raise UserError(_not_finite("norm of the gradient", norm, step))
        if not skipped:
            scale_(self._gradients(), clip_factor(norm, self.clip or math.inf))
            self.optimizer.step()
        self.loss_scale.update(overflowed=skipped)
        if self.loss_scale.scale < _SMALLEST_SCALE:
            raise UserError(
                f"the gradient overflows float16 at every loss scale, at step {step}; "
                'set train.precision = "bf16" or "fp32", or a lower optim.lr'
            )
        update_selection_bias(self.model, self._reduce_counts)
        return StepResult(loss, None if skipped else norm, num_tokens(batch))

    def accumulate(self, step: int, batch: Batch) -> Tensor:
        """Add the gradient of the whole step's loss, times the loss scale.

        Returns:
            The loss, a scalar on the device: the host has not waited for it.
        """
        if batch.num_targets == 0:
            kind = "is empty" if batch.targets_BS.numel() == 0 else "is all padding"
            raise UserError(
                f"the batch of step {step} {kind}: it has no token to predict; "
                "check the data, and data.seq_len against its documents"
            )
        return self.passes.backward(batch, seed=self.seed, step=step, scale=self.loss_scale.scale)

    def _unscale(self) -> None:
        # A power of two: nothing is rounded.
        scale_(self._gradients(), 1 / self.loss_scale.scale)

    def _norm(self) -> Tensor:
        if self.passes.mesh is None:
            return torch.linalg.vector_norm(norms(self._gradients()))
        from expertmesh.parallel.clip import grad_norm

        return grad_norm(list(self.model.parameters()), self.passes.mesh)

    def _gradients(self) -> list[Tensor]:
        return gradients_of(list(self.model.parameters()))

    def _reduce_counts(self, counts: Tensor) -> Tensor:
        if self.passes.mesh is None:
            return counts
        from expertmesh.dispatch.collectives import total

        return total(counts, self.passes.mesh.stage)


def _read(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Two scalars of one device for one wait."""
    wide = torch.promote_types(first.dtype, second.dtype)
    one, two = torch.stack([first.to(wide), second.to(wide)]).tolist()
    return one, two


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse a model with a weight that is not finite, naming the first one.

    Raises:
        UserError: If there is one.
    """
    for name, param in model.named_parameters():
        if not bool(shard_of(param).local.isfinite().all()):
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
