"""AdamW, torch's own."""

from typing import Any

import torch


def build_adamw(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over groups of parameters.

    The fused implementation is used where every parameter is on a device that has it (CPU, CUDA),
    else the one that works on lists of tensors (``foreach``).

    Args:
        groups: As torch's optimizers take them; in each all parameters are ``DTensor`` or none.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the root of the second moment.
    """
    devices = {param.device.type for group in groups for param in group["params"]}
    fused = devices <= {"cpu", "cuda", "xpu"}
    foreach = None if fused else True
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused, foreach=foreach)
