"""In which dtype a run computes. Weights, optimizer state and the loss stay in float32."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from expertmesh.errors import UserError

PrecisionName = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Precision:
    """A named way to compute.

    Attributes:
        name: ``"fp32"``; ``"bf16"``: matrix products under autocast, no loss scale, since bfloat16
            has float32's range; ``"fp16"``: autocast with a dynamic loss scale (Micikevicius et
            al., 2018).
    """

    name: PrecisionName

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a forward pass; does nothing for ``"fp32"``."""
        if self.name == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(device.type, dtype=dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """The loss scale: dynamic for ``"fp16"``, and a constant 1 that costs nothing else."""
        return torch.amp.GradScaler(device.type, enabled=self.name == "fp16")


def pick_device(name: str) -> torch.device:
    """The device of a run: ``"auto"`` is the accelerator that torch has, else the CPU.

    Raises:
        UserError: If the name is none of torch's, or there is no such device here.
    """
    if name != "auto":
        try:
            device = torch.empty(0, device=name).device
            if device.type == "meta":
                raise RuntimeError("the meta device computes nothing")
            return device
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"run.device must be auto, cpu or another device that torch finds here, got "
                f"{name!r}: {str(error).splitlines()[0]}"
            ) from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None else accelerator
