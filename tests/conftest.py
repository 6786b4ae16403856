"""What all tests share."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from expertmesh.kernels import triton_support

# Workers of pytest-xdist share the cores: more threads than cores is slower than one each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is
# imported by anything.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def forget_gpus() -> Iterator[Callable[[], None]]:
    """A GPU that one test pretends to have is not remembered in the next, nor after a call."""

    def forget() -> None:
        triton_support.known_capability.cache_clear()
        triton_support.known_refusal.cache_clear()

    yield forget
    forget()
