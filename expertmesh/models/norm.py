"""Root mean square norm."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight`` over the last dim (Zhang and Sennrich, 2019).

    The mean is taken in float32 or wider. The weight is cast to ``x``'s type first: under autocast
    the heads' norms see bfloat16 beside float32 weights, which torch's own module answers with a
    warning and its slow path.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
