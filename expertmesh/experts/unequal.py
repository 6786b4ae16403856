"""Experts of one structure and unequal width: narrow ones for easy tokens, wide ones for hard."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from expertmesh.experts.base import Experts
from expertmesh.kernels.activations import (
    Activation,
    activation_name,
    check_parts,
    resolve_activation,
)
from expertmesh.kernels.backends import check_backend
from expertmesh.kernels.moe_mlp.block_sparse.unequal import UNEQUAL_BACKENDS, unequal_mlp
from expertmesh.random import fill_normal_, fold, fresh_seed


class UnequalExperts(Experts):
    """MLPs whose hidden units lie one behind the other: expert e has ``widths[e]`` of them.

    On a GPU their products are block-sparse ones, one for all experts (MegaBlocks,
    arXiv 2211.15841); elsewhere experts run one after another. Parameters are not stacked, so
    experts cannot be dealt out over an ``ep`` axis.

    Args:
        dim: Width D of the rows.
        widths: Hidden units of each expert, E numbers. Multiples of 128 waste nothing on a GPU,
            multiples of 16 little.
        activation: A name, or an elementwise callable without parameters; None takes the
            family's ``default_activation``.
        bias: Whether all projections have biases.
        init_std: Standard deviation of all weights; None takes ``D ** -0.5`` for the first
            projection and, for the second, each expert's own ``width ** -0.5``. Biases are 0.
        seed: Governs the initial values; None draws one from torch's generator. An expert's are
            those of the same expert among stacked ones of its width.
        backend: ``"auto"``, ``"block_sparse"`` or ``"reference"``.
        device: Where the parameters lie. On ``meta`` nothing is drawn; call
            ``reset_parameters(seed)`` after ``to_empty``.
        dtype: Of the parameters.

    Attributes:
        widths: Hidden units of each expert.
        down: ``(H, D)``, a row for each hidden unit; H is the sum of the widths.
        down_bias: ``(E, D)``, or None.
    """

    up_name: ClassVar[str]
    num_parts: ClassVar[int]
    default_activation: ClassVar[str]

    down: nn.Parameter
    down_bias: nn.Parameter | None

    hidden_separable = False

    def __init__(
        self,
        dim: int,
        widths: Sequence[int],
        *,
        activation: str | Activation | None = None,
        bias: bool = False,
        init_std: float | None = None,
        seed: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(len(widths), dim)
        if min(widths) < 1:
            raise ValueError(f"widths must be at least 1 each, got {tuple(widths)}")
        if init_std is not None and not (math.isfinite(init_std) and init_std >= 0):
            raise ValueError(f"init_std must be a number >= 0 or None, got {init_std}")
        self.widths = tuple(widths)
        self.activation = resolve_activation(
            self.default_activation if activation is None else activation
        )
        check_parts(self.activation, self.num_parts)
        check_backend(UNEQUAL_BACKENDS, backend)
        self.init_std, self.backend = init_std, backend
        hidden, parts = sum(widths), self.num_parts
        shapes: dict[str, tuple[int, ...]] = {self.up_name: (parts, hidden, dim)}
        shapes["down"] = (hidden, dim)
        biases: dict[str, tuple[int, ...]] = {f"{self.up_name}_bias": (parts, hidden)}
        biases["down_bias"] = (len(widths), dim)
        for name, shape in {**shapes, **biases}.items():
            wanted = bias or name in shapes
            empty = torch.empty(shape, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        if not self.down.is_meta:
            self.reset_parameters(seed)

    @property
    @abstractmethod
    def projection(self) -> tuple[Tensor, Tensor | None]:
        """The first projection ``(M, H, D)`` and its bias ``(M, H)`` or None."""

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        self._check(x_RD)
        up_MHD, up_bias_MH = self.projection
        return unequal_mlp(
            x_RD,
            expert_RK,
            weight_RK,
            up_MHD,
            self.down,
            widths=self.widths,
            up_bias_MH=up_bias_MH,
            down_bias_ED=self.down_bias,
            activation=self.activation,
            backend=self.backend,
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Normal weights, each expert under its own key; zero biases."""
        seed = fresh_seed() if seed is None else seed
        up_MHD, up_bias_MH = self.projection
        up_key, down_key = fold(seed, self.up_name), fold(seed, "down")
        for expert, units in enumerate(self._units()):
            width = self.widths[expert]
            up_MFD = up_MHD.new_empty(self.num_parts, width, self.dim)
            down_DF = up_MHD.new_empty(self.dim, width)
            fill_normal_(up_MFD, self._std(self.dim), fold(up_key, expert))
            fill_normal_(down_DF, self._std(width), fold(down_key, expert))
            up_MHD[:, units] = up_MFD
            self.down[units] = down_DF.mT
        for bias in (up_bias_MH, self.down_bias):
            if bias is not None:
                bias.zero_()

    def _std(self, fan_in: int) -> float:
        return float(fan_in**-0.5) if self.init_std is None else self.init_std

    def _units(self) -> list[slice]:
        """Where each expert's hidden units are."""
        stops = torch.tensor(self.widths).cumsum(0).tolist()
        return [slice(stop - width, stop) for width, stop in zip(self.widths, stops, strict=True)]

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, widths={self.widths}, "
            f"activation={activation_name(self.activation)}, backend={self.backend}"
        )


class UnequalMLPExperts(UnequalExperts):
    """``down(activation(up(x)))`` with experts of unequal width.

    Arguments are ``UnequalExperts``'; the activation is relu unless given.

    Attributes:
        up: ``(1, H, D)``.
        up_bias: ``(1, H)``, or None.
    """

    up_name, num_parts, default_activation = "up", 1, "relu"

    up: nn.Parameter
    up_bias: nn.Parameter | None

    @property
    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.up, self.up_bias


class UnequalGatedMLPExperts(UnequalExperts):
    """``down(activation(gate(x)) * up(x))`` with experts of unequal width.

    Arguments are ``UnequalExperts``'; the gate's activation is silu unless given.

    Attributes:
        gate_up: ``(2, H, D)``, the gate at index 0.
        gate_up_bias: ``(2, H)``, or None.
    """

    up_name, num_parts, default_activation = "gate_up", 2, "silu"

    gate_up: nn.Parameter
    gate_up_bias: nn.Parameter | None

    @property
    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.gate_up, self.gate_up_bias
