"""What the two MLP families share: stacked parameters, their initial values, their printing."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.experts.base import Experts
from expertmesh.kernels.activations import Activation, activation_name, resolve_activation
from expertmesh.kernels.moe_mlp.dropout import HiddenDropout
from expertmesh.random import bits, fill_expert_normal_, fold, fresh_seed
from expertmesh.shards import local, shard_of


class StackedMLPExperts(Experts):
    """Experts of two projections and an activation between them, ``[E, ...]`` each.

    Attributes:
        hidden: Hidden width F of one expert.
        activation: The function between the projections.
        init_std: Standard deviation of all initial weights, or None.
        dropout: Probability that training drops a hidden unit.
        backend: Which implementation runs.
    """

    down: nn.Parameter

    hidden_separable = True

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str | Activation,
        init_std: float | None,
        dropout: float,
        backend: str,
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
        self.activation = resolve_activation(activation)
        self.init_std = init_std
        self.backend = backend

    @property
    @abstractmethod
    def fan_in(self) -> dict[str, int]:
        """The number of inputs of each weight, by parameter name. Biases are not in it."""

    def _register(
        self,
        weights: dict[str, tuple[int, ...]],
        biases: dict[str, tuple[int, ...]],
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        for name, shape in weights.items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        for name, shape in biases.items():
            empty = torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty) if bias else None)

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

    @staticmethod
    def _own(bias: Tensor | None) -> Tensor | None:
        """The part of a bias that this rank holds."""
        return None if bias is None else local(bias)

    def _output_bias(self, down: Tensor, bias: Tensor | None) -> Tensor | None:
        """What this rank adds of the output bias, where ranks hold slices of the hidden units.

        Each slice adds its share, so that the sum over slices has the bias once.
        """
        if bias is None:
            return None
        share = local(down).shape[-1] / self.hidden
        own = local(bias)
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

    def _draw(self, seed: int | None, parameter: Tensor) -> None:
        """Initial values at construction; a meta device has no place for them."""
        if not parameter.is_meta:
            self.reset_parameters(seed)

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
