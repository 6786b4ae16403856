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


def matmul_transposed(a_MI: Tensor, b_OI: Tensor) -> Tensor:
    """``a @ b.T`` for matrices of any strides, outside of autograd.

    Args:
        a_MI: ``(M, I)``.
        b_OI: ``(O, I)``.

    Returns:
        ``(M, O)``, contiguous.
    """
    big = min(*a_MI.shape, b_OI.shape[0]) >= _SMALLEST
    if _ONEDNN and big and a_MI.dtype == torch.float32 and a_MI.device.type == "cpu":
        return torch.ops.mkldnn._linear_pointwise(a_MI, b_OI, None, "none", [], "")
    return torch.mm(a_MI, b_OI.t())
