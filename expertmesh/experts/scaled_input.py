"""Experts whose combine weight multiplies what goes in, not what comes out (Llama 4)."""

from itertools import chain

import torch
from torch import Tensor

from expertmesh.experts.base import Experts
from expertmesh.shards import local


class ScaledInputExperts(Experts):
    """``y_r = sum_k E_{e_rk}(w_rk x_r)`` in place of ``sum_k w_rk E_{e_rk}(x_r)``.

    An expert is not linear, so the two differ. Llama 4 routes so, with k = 1 and a sigmoid weight
    (its released code). Rows of more than one choice are copied, once for each.

    Args:
        experts: Any experts; they see every row with weight 1.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts.num_experts, experts.dim)
        self.experts = experts
        self.hidden_separable = experts.hidden_separable

    @property
    def hidden_dims(self) -> dict[str, int | None] | None:
        inner = self.experts.hidden_dims
        return None if inner is None else {f"experts.{name}": dim for name, dim in inner.items()}

    @property
    def dropout(self) -> float:  # type: ignore[override]  # what is an attribute there is asked for
        """That of the experts."""
        return self.experts.dropout

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        self._check(x_RD)
        k = expert_RK.shape[1]
        # Rows of padding may hold anything, and a product with it has a gradient.
        served_RK1 = (expert_RK < self._num_local()).unsqueeze(2)
        x_RKD = torch.where(served_RK1, x_RD.unsqueeze(1), x_RD.new_zeros(()))
        scaled_RKD = (x_RKD * weight_RK.unsqueeze(2)).to(x_RD.dtype)
        ones_N1 = torch.ones_like(weight_RK).reshape(-1, 1)
        draw_N = None if draw_R is None else draw_R.repeat_interleave(k)
        y_ND = self.experts(scaled_RKD.flatten(0, 1), expert_RK.reshape(-1, 1), ones_N1, draw_N)
        wide = torch.promote_types(torch.float32, y_ND.dtype)
        return y_ND.unflatten(0, (len(x_RD), k)).sum(dim=1, dtype=wide).to(x_RD.dtype)

    def _num_local(self) -> int:
        """Experts on this rank, which is also the sentinel there."""
        if self.experts.hidden_dims is None:
            return self.num_experts
        values = chain(self.experts.parameters(), self.experts.buffers())
        stack = next(values, None)
        return self.num_experts if stack is None else len(local(stack))

    def reset_parameters(self, seed: int | None = None) -> None:
        """Those of the experts."""
        self.experts.reset_parameters(seed)
