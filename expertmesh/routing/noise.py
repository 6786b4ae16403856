"""Exploration noise of routers. In training only: evaluation is deterministic.

Published codes differ in what is perturbed and by how much, so each class states both.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertmesh.errors import UserError
from expertmesh.random import label
from expertmesh.routing.checks import check_deviation
from expertmesh.routing.draw import Draw

_NORMAL = label("normal noise")
_UNIFORM = label("uniform noise")
_JITTER = label("input jitter")
_LEARNED = label("learned noise")


@dataclass(frozen=True)
class NoisyLogits:
    """Router logits with and without additive noise.

    Attributes:
        clean_TE: ``(T, E)`` before noise on the logits.
        noisy_TE: ``(T, E)``; what scores and selection use.
        std_TE: Standard deviation of additive normal noise, broadcastable to ``(T, E)``, or None
            where the noise is of another kind.
        factors: x and weight where ``router_logits`` made them, without noise; else None.
    """

    clean_TE: Tensor
    noisy_TE: Tensor
    std_TE: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None


class Noise(nn.Module, ABC):
    """Perturbs the computation of router logits ``x W^T``."""

    @abstractmethod
    def forward(self, x_TD: Tensor, weight_ED: Tensor, draw: Draw) -> NoisyLogits:
        """Logits of ``x_TD`` ``(T, D)`` under ``weight_ED`` ``(E, D)``, with noise."""

    @abstractmethod
    def reset_parameters(self, seed: int) -> None:
        """Draw initial values, a function of the seed; nothing where nothing is learned."""

    def check(self, field: str, dim: int, num_experts: int) -> None:
        """Refuse logits ``(T, num_experts)`` of ``(T, dim)`` where the noise is made for others.

        Raises:
            ValueError: Naming the router's field.
        """


def _check_positive(field: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{field} must be above 0, got {value}; leave the noise out for none")


class NormalNoise(Noise):
    """Adds N(0, std^2) to the logits.

    Args:
        std: Standard deviation. None is 1/E, as in V-MoE (arXiv 2106.05974). ColossalAI's generator
            of this name uses 1/E^2 as the standard deviation: give ``std=1/E**2`` for that.
    """

    def __init__(self, std: float | None = None) -> None:
        super().__init__()
        if std is not None:
            _check_positive("NormalNoise.std", std)
        self.std = std

    def reset_parameters(self, seed: int) -> None:
        """Nothing is learned here."""

    def forward(self, x_TD: Tensor, weight_ED: Tensor, draw: Draw) -> NoisyLogits:
        """See ``Noise.forward``."""
        clean_TE = x_TD @ weight_ED.T
        num_experts = len(weight_ED)
        # Filled on the device: a number copied there would make the host wait.
        std = clean_TE.new_full((), self.std if self.std is not None else 1.0 / num_experts)
        noise_TE = draw.normal(_NORMAL, num_experts, clean_TE.dtype)
        return NoisyLogits(clean_TE, clean_TE + std * noise_TE, std)


class UniformNoise(Noise):
    """Multiplies the logits by U(1 - epsilon, 1 + epsilon), as ColossalAI's generator does.

    Args:
        epsilon: Half the width. Switch perturbs the router's input instead: see ``InputJitter``.
    """

    def __init__(self, epsilon: float = 1e-2) -> None:
        super().__init__()
        _check_positive("UniformNoise.epsilon", epsilon)
        self.epsilon = epsilon

    def reset_parameters(self, seed: int) -> None:
        """Nothing is learned here."""

    def forward(self, x_TD: Tensor, weight_ED: Tensor, draw: Draw) -> NoisyLogits:
        """See ``Noise.forward``."""
        clean_TE = x_TD @ weight_ED.T
        uniform_TE = draw.uniform(_UNIFORM, len(weight_ED), clean_TE.dtype)
        return NoisyLogits(clean_TE, clean_TE * (1 + self.epsilon * (2 * uniform_TE - 1)))


class InputJitter(Noise):
    """Multiplies the router's input by U(1 - epsilon, 1 + epsilon) (Switch, arXiv 2101.03961, 2.4).

    Args:
        epsilon: Half the width.
    """

    def __init__(self, epsilon: float = 1e-2) -> None:
        super().__init__()
        _check_positive("InputJitter.epsilon", epsilon)
        self.epsilon = epsilon

    def reset_parameters(self, seed: int) -> None:
        """Nothing is learned here."""

    def forward(self, x_TD: Tensor, weight_ED: Tensor, draw: Draw) -> NoisyLogits:
        """See ``Noise.forward``."""
        uniform_TD = draw.uniform(_JITTER, x_TD.shape[1], x_TD.dtype)
        logits_TE = (x_TD * (1 + self.epsilon * (2 * uniform_TD - 1))) @ weight_ED.T
        return NoisyLogits(logits_TE, logits_TE)


class LearnedNoise(Noise):
    """Adds normal noise of a learned standard deviation (Shazeer et al., arXiv 1701.06538, eq. 4).

    ``H(x) = x W_g + N(0, 1) * (softplus(x W_noise) + min_std)``; W_noise starts at zero.

    Args:
        dim: D.
        num_experts: E.
        min_std: Added to the standard deviation; the paper's formula has 0, tensor2tensor 1e-2.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        min_std: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_deviation("LearnedNoise.min_std", min_std)
        self.min_std = min_std
        self.weight_ED = nn.Parameter(torch.zeros(num_experts, dim, device=device, dtype=dtype))

    def check(self, field: str, dim: int, num_experts: int) -> None:
        """See ``Noise.check``."""
        made = tuple(self.weight_ED.shape)
        if made != (num_experts, dim):
            raise UserError(
                f"{field} must be made for dim={dim} and {num_experts} logits, got "
                f"LearnedNoise({made[1]}, {made[0]}); set LearnedNoise({dim}, {num_experts})"
            )

    def reset_parameters(self, seed: int) -> None:
        """Zero, whatever the seed, as the paper starts it."""
        nn.init.zeros_(self.weight_ED)

    def forward(self, x_TD: Tensor, weight_ED: Tensor, draw: Draw) -> NoisyLogits:
        """See ``Noise.forward``."""
        clean_TE = x_TD @ weight_ED.T
        std_TE = functional.softplus(x_TD @ self.weight_ED.to(x_TD.dtype).T) + self.min_std
        noise_TE = draw.normal(_LEARNED, len(weight_ED), clean_TE.dtype)
        return NoisyLogits(clean_TE, clean_TE + std_TE * noise_TE, std_TE)
