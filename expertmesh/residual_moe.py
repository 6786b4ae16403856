"""Routed experts beside something that every token passes: mixed by coefficients, or gated.

The plain sum, ``moe(x) + mlp(x)``, is ``MoE(router, experts, shared=mlp)``.
"""

from typing import Any

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.layer import MoE
from expertmesh.routing import Routing
from expertmesh.routing.logits import wide_dtype, wide_logits

__all__ = ["GatedShared", "ResidualMoE"]


class ResidualMoE(nn.Module):
    """``y = c_0 moe(x) + c_1 mlp(x)``, ``c = softmax(x W_c^T + b_c)`` per token.

    Residual MoE of DeepSpeed-MoE (arXiv 2201.05596, 4.1) as its code computes it: the paper's
    formula is the plain sum, which is ``MoE(..., shared=mlp)``. PR-MoE has more experts in later
    layers besides, which is a matter of how the layers are built.

    Args:
        moe: The routed experts; the paper's is top-1.
        mlp: Maps ``(..., D)`` to ``(..., D)``.
        seed: Of the initial ``coefficient_2D``, standard deviation ``D ** -0.5``; None draws one
            from torch's generator. ``bias_2`` starts at zero.
    """

    def __init__(
        self,
        moe: MoE,
        mlp: nn.Module,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.moe, self.mlp = moe, mlp
        dim = moe.experts.dim
        self.coefficient_2D = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        self.bias_2 = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))
        if not self.coefficient_2D.is_meta:
            self._draw(random.fresh_seed() if seed is None else seed)

    def _draw(self, seed: int) -> None:
        std = self.coefficient_2D.shape[1] ** -0.5
        random.fill_normal_(self.coefficient_2D, std, random.fold(seed, "coefficients"))
        nn.init.zeros_(self.bias_2)

    def reset_parameters(self, seed: int) -> None:
        """Draw coefficients and experts again, a function of the seed alone; the MLP is not."""
        self._draw(seed)
        self.moe.reset_parameters(seed)

    def forward(self, x: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, Routing]:
        """Both branches, mixed.

        Args:
            x: ``(..., D)``.
            arguments: Those of ``MoE.forward``.

        Returns:
            ``x``'s shape and dtype; with ``return_routing=True`` the routing too.
        """
        routed = self.moe(x, **arguments)
        moe, *routing = routed if isinstance(routed, tuple) else (routed,)
        mlp = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            bias_2 = self.bias_2.to(wide_dtype(x, self.bias_2))
            c_2 = (wide_logits(x, self.coefficient_2D) + bias_2).softmax(dim=-1)
            y = c_2[..., :1] * moe + c_2[..., 1:] * mlp
        y = y.to(x.dtype)
        return (y, routing[0]) if routing else y


class GatedShared(nn.Module):
    """``sigmoid(x w) * module(x)``: a shared expert with a gate, for ``MoE(..., shared=...)``.

    As in Qwen2-MoE (arXiv 2407.10671, and its released code): one gate per token, without a bias.

    Args:
        module: Maps ``(..., D)`` to ``(..., D)``, for example ``expertmesh.models.mlp.GatedMLP``.
        dim: D.
        init_std: Standard deviation of the initial ``weight_1D``.
        seed: Of it; None draws one from torch's generator.
    """

    def __init__(
        self,
        module: nn.Module,
        dim: int,
        *,
        init_std: float = 0.02,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.init_std = init_std
        self.weight_1D = nn.Parameter(torch.empty(1, dim, device=device, dtype=dtype))
        if not self.weight_1D.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw the gate's weight, a function of the seed alone; the module is left as it is."""
        random.fill_normal_(self.weight_1D, self.init_std, random.fold(seed, "shared gate"))

    def forward(self, x: Tensor) -> Tensor:
        """Args: ``x`` ``(..., D)``. Returns the same shape and dtype."""
        y = self.module(x)
        with torch.autocast(x.device.type, enabled=False):
            gate = wide_logits(x, self.weight_1D).sigmoid()
        return (gate * y).to(x.dtype)
