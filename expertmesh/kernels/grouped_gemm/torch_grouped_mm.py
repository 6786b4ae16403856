"""Grouped products by ``torch.nn.functional.grouped_mm``: one kernel, no host synchronisation.

What it asks for: float32, float16 or bfloat16, and strides that are multiples of 16 bytes. On
CUDA only bfloat16 from compute capability 8.0 on is one kernel; torch loops over the groups for
the other types.
"""

import torch
from torch import Tensor

from expertmesh.kernels.grouped_gemm.base import GroupedGemm

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class TorchGroupedMM(GroupedGemm):
    """``torch.nn.functional.grouped_mm`` in its 2D x 3D and 2D x 2D forms."""

    def matmul(self, x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
        if x_NI.shape[0] == 0:
            return x_NI.new_empty(0, weight_EIO.shape[2])
        return torch.nn.functional.grouped_mm(x_NI, weight_EIO, offs=offsets_E)

    def outer(self, a_NI: Tensor, b_NO: Tensor, offsets_E: Tensor) -> Tensor:
        if a_NI.shape[0] == 0:
            return a_NI.new_zeros(len(offsets_E), a_NI.shape[1], b_NO.shape[1])
        return torch.nn.functional.grouped_mm(a_NI.t(), b_NO, offs=offsets_E)
