"""What all tests share."""

import os

import torch

# Workers of pytest-xdist share the cores: more threads than cores is slower than one each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Without a GPU Triton's kernels run in its interpreter, which must be chosen before triton is
# imported by anything.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
