# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Warps that do nothing but gather rows by token into a ring in shared memory (Gluon, Hopper).

The copy engine of Hopper has no gather. Each thread of these warps copies pieces of 16 bytes
asynchronously, and the barrier that the products wait at counts the threads whose copies are there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

_WARPS = 4

GATHERING_WARPS = gl.constexpr(_WARPS)

ARRIVALS = gl.constexpr(32 * _WARPS + 1)
"""At the barrier of a step: every gathering thread, and who announces the copy engine's bytes."""


@gluon.constexpr_function
def gathering_layout(width):
    """Rows of ``width`` numbers of 16 bits: neighbouring lanes copy neighbouring pieces."""
    lanes = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [_WARPS, 1], [1, 0])


@gluon.jit
def bring(source_ptrs, mask, target, ready):
    """Copy to shared memory, 0 where not ``mask``; each thread arrives when its part is there."""
    async_copy.async_copy_global_to_shared(target, source_ptrs, mask=mask)
    async_copy.mbarrier_arrive(ready, increment_count=False)
