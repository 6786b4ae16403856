"""Root mean square norm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertmesh.kernels.dtypes import autocast_dtype, cast


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the last dim (Zhang and Sennrich, 2019).

    The mean is taken in float32 or wider. The weight is cast to ``x``'s type first: under autocast
    the heads' norms see bfloat16 beside float32 weights, which torch's own module answers with a
    warning and its slow path.

    Under autocast the result has autocast's dtype: every product that reads it would round it,
    each for itself. The residual stream before it keeps its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        dtype = autocast_dtype(x.device.type)
        return y if dtype is None or x.dtype == torch.float64 else cast(y, dtype)
