"""Grouped products as one matrix product after another: every device and dtype, float64 too.

The row counts are read on the host, once per call. Both products are operators of the torch
library, so that ``torch.compile`` keeps them in its graph without looking inside. They are
defined with ``torch.library.define``: ``custom_op`` imports the compiler at the first call,
which takes a second that a plain run should not pay.
"""

from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.grouped_gemm.base import GroupedGemm
from expertmesh.kernels.grouped_gemm.matmul import matmul_transposed

# Reading the counts on the host cannot be recorded into a CUDA graph.
_TAGS = (torch.Tag.cudagraph_unsafe,)
torch.library.define(
    "expertmesh::grouped_matmul",
    "(Tensor x_NI, Tensor weight_EIO, Tensor offsets_E) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "expertmesh::grouped_outer",
    "(Tensor a_NI, Tensor b_NO, Tensor offsets_E) -> Tensor",
    tags=_TAGS,
)


@torch.library.impl("expertmesh::grouped_matmul", "CompositeExplicitAutograd")
def _matmul(x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    y_NO = x_NI.new_zeros(x_NI.shape[0], weight_EIO.shape[2])
    start = 0
    for weight_IO, stop in zip(weight_EIO.unbind(0), offsets_E.tolist(), strict=True):
        if stop > start:
            y_NO[start:stop] = matmul_transposed(x_NI[start:stop], weight_IO.t())
        start = stop
    return y_NO


@torch.library.impl("expertmesh::grouped_outer", "CompositeExplicitAutograd")
def _outer(a_NI: Tensor, b_NO: Tensor, offsets_E: Tensor) -> Tensor:
    y_EIO = a_NI.new_zeros(len(offsets_E), a_NI.shape[1], b_NO.shape[1])
    start = 0
    for y_IO, stop in zip(y_EIO.unbind(0), offsets_E.tolist(), strict=True):
        if stop > start:
            y_IO.copy_(matmul_transposed(a_NI[start:stop].t(), b_NO[start:stop].t()))
        start = stop
    return y_EIO


@torch.library.register_fake("expertmesh::grouped_matmul")
def _matmul_fake(x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EIO.shape[2])


@torch.library.register_fake("expertmesh::grouped_outer")
def _outer_fake(a_NI: Tensor, b_NO: Tensor, offsets_E: Tensor) -> Tensor:
    return a_NI.new_empty(offsets_E.shape[0], a_NI.shape[1], b_NO.shape[1])


def _no_second_order(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("the grouped products have no gradient of their own; call moe_mlp instead")


torch.library.register_autograd("expertmesh::grouped_matmul", _no_second_order)
torch.library.register_autograd("expertmesh::grouped_outer", _no_second_order)


class LoopGemm(GroupedGemm):
    """``torch.mm`` for one group after another, or oneDNN where it is faster."""

    def matmul(self, x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
        return torch.ops.expertmesh.grouped_matmul(x_NI, weight_EIO, offsets_E)

    def outer(self, a_NI: Tensor, b_NO: Tensor, offsets_E: Tensor) -> Tensor:
        return torch.ops.expertmesh.grouped_outer(a_NI, b_NO, offsets_E)
