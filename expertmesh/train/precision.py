"""In which dtype a run computes. Weights, optimizer state and the loss stay in float32."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

from expertmesh.errors import UserError, nearest

PrecisionName = Literal["fp32", "bf16", "fp16"]
_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_NOT_BUILT = "this torch is not built for it"


@dataclass(frozen=True)
class Precision:
    """A named way to compute.

    Attributes:
        name: ``"fp32"``; ``"bf16"``: matrix products under autocast, no loss scale, since bfloat16
            has float32's range; ``"fp16"``: autocast with a dynamic loss scale (Micikevicius et
            al., 2018).
    """

    name: PrecisionName

    @property
    def narrow(self) -> torch.dtype | None:
        """What autocast is on with; None for ``"fp32"``."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a forward pass; does nothing for ``"fp32"``."""
        if self.narrow is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.narrow)

    def loss_scale(self) -> "LossScale":
        """Dynamic for ``"fp16"``, and a constant 1 else."""
        return LossScale(enabled=self.name == "fp16")


@final
class LossScale:
    """By how much a loss is multiplied so that gradients in float16 do not vanish.

    It doubles after ``interval`` good steps, and halves, and the step is skipped, when a gradient
    overflows. Whether one did is read from the global norm, so ranks never part ways.

    Args:
        enabled: If not, it is 1 for ever.
        scale: The first.
        interval: Good steps before it doubles.
    """

    def __init__(
        self, *, enabled: bool = True, scale: float = 2.0**16, interval: int = 2000
    ) -> None:
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self.interval = interval
        self._good_steps = 0

    def update(self, *, overflowed: bool) -> None:
        """Say how a step went."""
        if not self.enabled:
            return
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.scale /= 2
        elif self._good_steps == self.interval:
            self.scale *= 2
            self._good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps; empty where nothing changes."""
        return {"scale": self.scale, "good_steps": self._good_steps} if self.enabled else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where ``state_dict`` was taken; of a run in another precision it is empty."""
        if self.enabled and state:
            self.scale = state["scale"]
            self._good_steps = int(state["good_steps"])


def pick_device(name: str) -> torch.device:
    """The device of a run: ``"auto"`` is the accelerator that torch has, else the CPU.

    Raises:
        UserError: If the name is none of torch's, or there is no such device here.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(name)
    except RuntimeError:
        # torch's own message lists every type of device that a build of it may have.
        raise UserError(
            "run.device must be auto, cpu, cuda, cuda:0 or another device of torch, got "
            f"{name!r}{_meant(name)}"
        ) from None
    try:
        if device.type == "meta":
            raise RuntimeError("the meta device computes nothing")
        return torch.empty(0, device=device).device
    except NotImplementedError:
        reason = _NOT_BUILT
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        # Of some devices a torch without them says only where in its code it gave up.
        reason = _NOT_BUILT if "INTERNAL ASSERT" in reason else reason
    raise UserError(f"run.device must be {_devices_here()} on this machine, got {name!r}: {reason}")


def _meant(name: str) -> str:
    """A hint for a name that torch does not know; "gpu" is no misspelt "cpu"."""
    name = name.lower()
    return nearest("auto" if name.startswith("gpu") else name, _DEVICES)


def _devices_here() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "auto or cpu"
    kind, last = accelerator.type, torch.accelerator.device_count() - 1
    return f"auto, cpu, {kind} or {kind}:0" + (f" to {kind}:{last}" if last else "")
