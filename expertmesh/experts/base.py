"""What the layer asks of its experts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Experts(nn.Module, ABC):
    """All experts of one layer behind one call.

    Attributes:
        num_experts: Number of experts E.
        dim: Width D of the rows.
        hidden_separable: Whether the output is a sum over hidden units, so that a rank may hold
            a slice of each expert.
        dropout: Probability that training drops a hidden unit; 0 for experts that know of none.
    """

    num_experts: int
    dim: int
    hidden_separable: bool
    dropout: float = 0.0

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_experts = num_experts
        self.dim = dim

    @property
    def hidden_dims(self) -> Mapping[str, int | None] | None:
        """Of every stacked parameter and buffer, the dim that counts hidden units, or None.

        By its name within this module; all have E first. A class that does not stack returns None:
        its experts cannot be dealt out over ranks.
        """
        return None

    @abstractmethod
    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        """The weighted sum of each row's experts.

        Args:
            x_RD: Rows, ``(R, D)``.
            expert_RK: Expert ids, ``(R, K)``; E means no expert and contributes nothing.
            weight_RK: Combine weights, ``(R, K)``.
            draw_R: int64 ``(R,)``, a random number of each row's token, for dropout; None draws
                them from torch's generator.

        Returns:
            ``(R, D)`` in x's dtype.
        """

    @abstractmethod
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw the initial values again.

        Args:
            seed: They depend on it, on the expert, and on the parameter's name, not on device,
                mesh or order. None draws a seed from torch's generator.
        """

    def _check(self, x_RD: Tensor) -> None:
        if x_RD.dim() != 2 or x_RD.shape[1] != self.dim:
            width = x_RD.shape[-1] if x_RD.dim() else 0
            raise ValueError(
                f"x has width {width} and shape {tuple(x_RD.shape)}, experts were built for "
                f"rows of dim={self.dim}; build them with dim={width}, or give (rows, {self.dim})"
            )
