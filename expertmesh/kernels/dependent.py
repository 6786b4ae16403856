# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Kernels that start while the one before them ends (programmatic dependent launch, Hopper).

Such a kernel waits before it reads what the one before wrote, and only then lets the next one
start, so that whatever came before the previous kernel is complete for every kernel that runs.
"""

from typing import Any

import triton
from torch import Tensor
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from expertmesh.kernels.triton_support import has_dependent_launch


@triton.jit
def wait(PDL: tl.constexpr):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def options(like: Tensor, warps: int = 4) -> dict[str, Any]:
    """Of a launch on a tensor's device: ``PDL`` for ``wait``, and what Triton is to be told."""
    dependent = has_dependent_launch(like.device)
    return {"PDL": dependent, "num_warps": warps} | ({"launch_pdl": True} if dependent else {})
