"""The fused kernels with QuACK's products where those are faster; imported when they run."""

from importlib import metadata
from typing import ClassVar

from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp.triton import FusedMLP
from expertmesh.kernels.triton_support import capability

_KNOWN = "0.3.11"
"""How its products are called changes from version to version."""


def _missing() -> str | None:
    """What to install; None if it is."""
    try:
        installed = metadata.version("quack-kernels")
    except metadata.PackageNotFoundError:
        return "quack-kernels is not installed; run: pip install 'expertmesh[hopper]'"
    if installed == _KNOWN:
        return None
    return (
        f"it calls quack-kernels as of {_KNOWN}, installed is {installed}; "
        "run: pip install 'expertmesh[hopper]'"
    )


QUACK_MISSING = _missing()
"""Asked once: what is traced by ``torch.compile`` wants to know it."""


class QuackMLP(FusedMLP):
    """With QuACK's gradients of matrices, which gather their rows on the way (CuTe)."""

    name: ClassVar[str] = "quack"
    summary: ClassVar[str] = "triton with QuACK's products where they are faster; Hopper, 16 bits"
    quack: ClassVar[bool] = True

    def refusal(self, problem: Problem) -> str | None:
        if problem.device.type == "cuda":
            major, minor = capability(problem.device)
            if (major, minor) != (9, 0):
                return f"it is for compute capability 9.0, this device has {major}.{minor}"
            if QUACK_MISSING:  # here already: this is asked at every call
                return QUACK_MISSING
        if problem.dtype.itemsize != 2:
            return f"it takes bfloat16 and float16, not {problem.dtype}"
        return super().refusal(problem) or QUACK_MISSING

    def suits(self, problem: Problem) -> bool:
        """In training: its products are in the backward pass."""
        return problem.needs_grad and super().suits(problem)
