"""Learning-rate schedules: the step's number in, the factor of the peak rate out."""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "wsd", "constant", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then one of four shapes.

    A schedule has no state: a resumed run asks for the factor of its step and gets what the
    uninterrupted run would have got.

    Attributes:
        name: ``"cosine"`` falls from 1 to ``final`` along half a cosine (Loshchilov and Hutter,
            2017); ``"wsd"`` stays at 1 and falls linearly over the last ``decay_steps`` (warm-up,
            stable, decay: Hu et al., 2024); ``"constant"`` stays at 1; ``"inverse_sqrt"`` falls
            with the root of the step, ``sqrt(warmup_steps / step)``, and does not depend on the
            run's length (Vaswani et al., 2017; T5).
        steps: Length of the run, in optimizer steps.
        warmup_steps: Steps over which the factor rises linearly to 1.
        decay_steps: Steps of the last phase; read by ``"wsd"`` only.
        final: Factor at the last step; read by ``"cosine"`` and ``"wsd"``.
    """

    name: ScheduleName
    steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    final: float = 0.0

    def __call__(self, step: int) -> float:
        """Factor for optimizer step ``step``, counted from 1 to ``steps``."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.name == "inverse_sqrt":
            return math.sqrt(max(self.warmup_steps, 1) / step)
        start = self.steps - self.decay_steps if self.name == "wsd" else self.warmup_steps
        start = max(start, self.warmup_steps)
        if self.name == "constant" or step <= start or start >= self.steps:
            return 1.0
        progress = min((step - start) / (self.steps - start), 1.0)
        if self.name == "wsd":
            return 1.0 - (1.0 - self.final) * progress
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
