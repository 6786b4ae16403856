"""One matrix product on the faster of the two CPU libraries that torch carries.

``torch.mm`` on float32 uses MKL, which takes its AVX2 path on processors of other makers. oneDNN
takes AVX-512 there and was seen to be twice as fast on an AMD EPYC (``benchmarks/layer_cpu.py``
shows both). torch reaches it for float32 through the operator its own compiler emits for linear
layers; where that operator is missing, ``torch.mm`` is used.
"""

import torch
from torch import Tensor

# Below this many rows, columns or summands the call costs more than the product saves.
_SMALLEST = 8


def onednn_available() -> bool:
    """Whether this torch carries oneDNN's linear operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = onednn_available()
# oneDNN compiles and keeps code for every shape that it meets, about half a MiB each. Experts' row
# counts change at every step, so callers round them up to few shapes.
_ROW_MULTIPLE = 64


def row_multiple(dtype: torch.dtype, device: torch.device) -> int:
    """What callers round row counts up to, with rows of zeros, before they multiply."""
    return _ROW_MULTIPLE if _uses_onednn(dtype, device) else 1


def _uses_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    return _ONEDNN and dtype == torch.float32 and device.type == "cpu"


def matmul_transposed(a_MI: Tensor, b_OI: Tensor) -> Tensor:
    """``a @ b.T`` for matrices of any strides, outside of autograd.

    Args:
        a_MI: ``(M, I)``.
        b_OI: ``(O, I)``.

    Returns:
        ``(M, O)``, contiguous.
    """
    big = min(*a_MI.shape, b_OI.shape[0]) >= _SMALLEST
    if big and _uses_onednn(a_MI.dtype, a_MI.device):
        return torch.ops.mkldnn._linear_pointwise(a_MI, b_OI, None, "none", [], "")
    return torch.mm(a_MI, b_OI.t())
