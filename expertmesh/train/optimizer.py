"""The optimizer by name, with the parameters sorted into those that decay and those that do not."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from expertmesh.errors import UserError
from expertmesh.shards import is_sharded
from expertmesh.train.schedule import ScheduleName

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule.

    Attributes:
        name: ``"adamw"`` (Loshchilov and Hutter, 2019), or ``"adafactor"`` (Shazeer and Stern,
            2018), whose rate is relative to each parameter's size and whose state is small.
        lr: Peak learning rate.
        schedule: Shape after the warm-up; see ``Schedule``.
        warmup_steps: Optimizer steps of linear warm-up.
        decay_steps: Length of the last phase of ``"wsd"``, in optimizer steps.
        final: Last factor of ``lr``, for ``"cosine"`` and ``"wsd"``.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        eps: Added to the root of AdamW's second moment.
        beta2_decay: Adafactor's second moment decays by ``1 - step ** -beta2_decay``.
        weight_decay: Decoupled decay, of matrices and expert stacks only.
        clip: Largest global norm of the gradient; 0 does not clip.
    """

    name: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 1e-3
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    beta2_decay: float = 0.8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.final <= 1.0:
            raise UserError(f"optim.final must be between 0 and 1, got {self.final}")
        self._refuse_what_does_nothing()
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise UserError(f"optim.{name} must be at least 0 and below 1, got {value}")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "clip", "lr"):
            value = getattr(self, name)
            if not math.isfinite(value):
                raise UserError(
                    f"optim.{name} must be finite, got {value}; "
                    f"set optim.{name} = {getattr(OptimConfig, name)}"
                )
            if value < 0:
                raise UserError(f"optim.{name} must not be negative, got {value}; set it >= 0")
        if not 0 < self.eps < math.inf:
            # An expert that got no token has moments of 0: its step would be 0 / 0.
            raise UserError(
                f"optim.eps must be above 0 and finite, got {self.eps}; set optim.eps = 1e-8"
            )
        if not 0 < self.beta2_decay < math.inf:
            raise UserError(
                f"optim.beta2_decay must be above 0 and finite, got {self.beta2_decay}; set 0.8"
            )
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise UserError(
                f"optim.decay_steps is the last phase of schedule 'wsd' and of no other, got "
                f"decay_steps={self.decay_steps} with schedule={self.schedule!r}; set both or none"
            )

    def _refuse_what_does_nothing(self) -> None:
        of_name = {"adamw": ("beta1", "beta2", "eps"), "adafactor": ("beta2_decay",)}
        for owner, names in of_name.items():
            for name in names:
                value = getattr(self, name)
                if owner != self.name and value != getattr(OptimConfig, name):
                    raise UserError(
                        f"optim.{name} is of optim.name = {owner!r}, got {name}={value} with "
                        f"name={self.name!r}; leave it out"
                    )
        if self.schedule not in ("cosine", "wsd") and self.final != OptimConfig.final:
            raise UserError(
                f"optim.final is of the schedules 'cosine' and 'wsd', got final={self.final} with "
                f"schedule={self.schedule!r}; leave it out"
            )


def decays(name: str, param: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter.

    Vectors (norm scales, biases, the router's own biases) do not decay. Stacked expert biases are
    matrices by shape and vectors by meaning, so names that end in ``bias`` do not decay either.
    """
    return param.dim() >= 2 and not name.endswith("bias")


def build_optimizer(
    model: nn.Module, config: OptimConfig, mesh: "Mesh | None" = None
) -> torch.optim.Optimizer:
    """The optimizer of a name over a model's trainable parameters.

    Args:
        model: Its parameters must be on their final device.
        config: Which one, rates and decay.
        mesh: What the model is laid out over; None is one process.

    Returns:
        An optimizer with groups of parameters that decay and that do not, in the model's order.
    """
    groups = _groups(model, config.weight_decay)
    if config.name == "adafactor":
        from expertmesh.train.optimizers.adafactor import build_adafactor

        return build_adafactor(groups, lr=config.lr, decay=config.beta2_decay, mesh=mesh)
    from expertmesh.train.optimizers.adamw import build_adamw

    betas = config.beta1, config.beta2
    return build_adamw(groups, lr=config.lr, betas=betas, eps=config.eps)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trainable:
        raise UserError("the model has no trainable parameter")
    # torch steps all tensors of a group at once, which must then be all sharded or all plain.
    kinds = [(decayed, sharded) for decayed in (True, False) for sharded in (False, True)]
    groups = [
        {
            "params": [
                param
                for name, param in trainable
                if (decays(name, param), is_sharded(param)) == (decayed, sharded)
            ],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for decayed, sharded in kinds
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
