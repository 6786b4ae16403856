"""What the MLP families share: arguments, stacked parameters, their initial values, the call."""

import math
from abc import abstractmethod
from typing import Any, ClassVar

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
from expertmesh.kernels.moe_mlp import MLP_BACKENDS, moe_mlp
from expertmesh.kernels.moe_mlp.dropout import HiddenDropout
from expertmesh.random import bits, fill_expert_normal_, fold, fresh_seed
from expertmesh.shards import local, shard_of


class StackedMLPExperts(Experts):
    """Experts of two projections and an activation between them, ``[E, ...]`` each.

    A family names its first projection, and the parts that it is made of.

    Args:
        dim: Width D of the rows.
        hidden: Hidden width F of one expert.
        num_experts: Number of experts E.
        activation: silu, gelu, gelu_tanh, relu, relu2, or any elementwise callable without
            parameters; None takes the family's ``default_activation``.
        bias: Whether all projections have biases.
        init_std: Standard deviation of all weights; None takes ``D ** -0.5`` for the first
            projection and ``F ** -0.5`` for ``down``, which keeps the size of what passes
            through. Biases are 0.
        dropout: Probability that training drops a hidden unit (Switch's expert dropout,
            arXiv 2101.03961, 2.4: 0.4 in fine-tuning, with 0.1 elsewhere).
        seed: Governs the initial values; None draws one from torch's generator.
        backend: ``"auto"``, or a name that ``expertmesh doctor`` lists.
        device: Where the parameters lie. On ``meta`` nothing is drawn; call
            ``reset_parameters(seed)`` after ``to_empty``.
        dtype: Of the parameters.

    Attributes:
        hidden: Hidden width F of one expert.
        activation: The function between the projections.
        init_std: Standard deviation of all initial weights, or None.
        dropout: Probability that training drops a hidden unit.
        backend: Which implementation runs.
        down: ``(E, D, F)``.
        down_bias: ``(E, D)``, or None.
    """

    up_name: ClassVar[str]
    up_parts: ClassVar[tuple[int, ...]]
    default_activation: ClassVar[str]

    down: nn.Parameter
    down_bias: nn.Parameter | None

    hidden_separable = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str | Activation | None = None,
        bias: bool = False,
        init_std: float | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, dim)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if init_std is not None and not (math.isfinite(init_std) and init_std >= 0):
            raise ValueError(f"init_std must be a number >= 0 or None, got {init_std}")
        if not 0 <= dropout < 1:
            raise ValueError(
                f"dropout must be at least 0 and below 1, got {dropout}; set dropout=0 for none"
            )
        self.hidden, self.dropout = hidden, dropout
        self.activation = resolve_activation(
            self.default_activation if activation is None else activation
        )
        check_parts(self.activation, math.prod(self.up_parts))
        check_backend(MLP_BACKENDS, backend)
        self.init_std, self.backend = init_std, backend
        weights: dict[str, tuple[int, ...]] = {
            self.up_name: (num_experts, *self.up_parts, hidden, dim),
            "down": (num_experts, dim, hidden),
        }
        biases: dict[str, tuple[int, ...]] = {
            f"{self.up_name}_bias": (num_experts, *self.up_parts, hidden),
            "down_bias": (num_experts, dim),
        }
        for name, shape in (weights | biases).items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            wanted = bias or name in weights
            self.register_parameter(name, nn.Parameter(empty) if wanted else None)
        if not self.down.is_meta:
            self.reset_parameters(seed)

    @property
    @abstractmethod
    def projection(self) -> tuple[Tensor, Tensor | None]:
        """The first projection ``(E, ..., F, D)`` and its bias ``(E, ..., F)`` or None."""

    @property
    def fan_in(self) -> dict[str, int]:
        """The number of inputs of each weight, by parameter name. Biases are not in it."""
        return {self.up_name: self.dim, "down": self.hidden}

    @property
    def hidden_dims(self) -> dict[str, int | None]:
        """See ``Experts.hidden_dims``."""
        up = 1 + len(self.up_parts)
        return {self.up_name: up, "down": 2, f"{self.up_name}_bias": up, "down_bias": None}

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        """See ``Experts.forward``."""
        self._check(x_RD)
        up, up_bias = self.projection
        return moe_mlp(
            x_RD,
            expert_RK,
            weight_RK,
            local(up),
            local(self.down),
            up_bias=None if up_bias is None else local(up_bias),
            down_bias=self._output_bias(),
            activation=self.activation,
            backend=self.backend,
            **self._drop(draw_R, x_RD),
        )

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Normal weights of standard deviation ``init_std``, or ``fan_in ** -0.5``; zero biases."""
        seed = fresh_seed() if seed is None else seed
        for name, parameter in self.named_parameters(recurse=False):
            if name in self.fan_in:
                std = self.fan_in[name] ** -0.5 if self.init_std is None else self.init_std
                fill_expert_normal_(parameter, std, fold(seed, name))
            else:
                parameter.zero_()

    def _output_bias(self) -> Tensor | None:
        """What this rank adds of the output bias, where ranks hold slices of the hidden units.

        Each slice adds its share, so that the sum over slices has the bias once.
        """
        if self.down_bias is None:
            return None
        share = local(self.down).shape[-1] / self.hidden
        own = local(self.down_bias)
        return own if share == 1 else _Share.apply(own, share)

    def _drop(self, draw_R: Tensor | None, x_RD: Tensor) -> dict[str, Any]:
        """What ``moe_mlp`` is told of dropout: in training only, and in the whole model's counts.

        Args:
            draw_R: The rows' numbers, or None.
            x_RD: The rows.
        """
        if not self.training or self.dropout == 0:
            return {}
        if draw_R is None:
            row_R = torch.arange(len(x_RD), device=x_RD.device)
            draw_R = bits(fresh_seed(), row_R)
        first_expert, _, first_unit = shard_of(self.down).offset
        return {"dropout": HiddenDropout(self.dropout, first_expert, first_unit), "draw_R": draw_R}

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden={self.hidden}, "
            f"activation={activation_name(self.activation)}, backend={self.backend}"
            + (f", dropout={self.dropout}" if self.dropout else "")
        )


class _Share(torch.autograd.Function):
    """A share of a replicated bias; its gradient is the whole bias's, the same on every slice."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, share: float) -> Tensor:
        return bias * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
