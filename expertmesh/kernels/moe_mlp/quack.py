"""The fused kernels with QuACK's products where those are faster; imported when they run."""

from importlib import metadata
from typing import ClassVar

from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp.triton import FusedMLP
from expertmesh.kernels.triton_support import capability

_KNOWN = "0.3.11"
"""How its products are called changes from version to version."""


def _installed() -> str | None:
    try:
        return metadata.version("quack-kernels")
    except metadata.PackageNotFoundError:
        return None


QUACK_VERSION = _installed()
"""Read once: what is traced by ``torch.compile`` asks for it."""


class QuackMLP(FusedMLP):
    """With QuACK's gradients of matrices, which gather their rows on the way (CuTe)."""

    name: ClassVar[str] = "quack"
    summary: ClassVar[str] = "triton with QuACK's products where they are faster; Hopper, 16 bits"
    quack: ClassVar[bool] = True

    def refusal(self, problem: Problem) -> str | None:
        if QUACK_VERSION is None:
            return "quack-kernels is not installed; run: pip install 'expertmesh[hopper]'"
        if QUACK_VERSION != _KNOWN:
            return (
                f"it calls quack-kernels as of {_KNOWN}, installed is {QUACK_VERSION}; "
                "run: pip install 'expertmesh[hopper]'"
            )
        if problem.dtype.itemsize != 2:
            return f"it takes bfloat16 and float16, not {problem.dtype}"
        refusal = super().refusal(problem)
        if refusal is None and problem.device.type == "cuda":
            major, minor = capability(problem.device)
            if (major, minor) != (9, 0):
                return f"it is for compute capability 9.0, this device has {major}.{minor}"
        return refusal

    def suits(self, problem: Problem) -> bool:
        """In training: its products are in the backward pass."""
        return problem.needs_grad and super().suits(problem)
