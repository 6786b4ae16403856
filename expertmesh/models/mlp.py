"""The dense MLPs."""

from torch import Tensor, nn

from expertmesh.kernels.activations import hidden_from_parts, resolve_activation


class GatedMLP(nn.Module):
    """``down(activation(gate(x)) * up(x))`` without biases (Shazeer, 2020).

    Args:
        dim: Width D of input and output.
        hidden: Hidden width F.
        activation: Name of the gate's activation.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = resolve_activation(activation)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x ``(..., D)``. Returns the same shape."""
        return self.down(hidden_from_parts(self.activation, (self.gate(x), self.up(x))))


class DoublyGatedMLP(nn.Module):
    """``down(linear(x) * activation(gate(x)) * up(x))`` without biases, as OpenMoE has it.

    Args:
        dim: Width D of input and output.
        hidden: Hidden width F.
        activation: Name of the gate's activation.
    """

    def __init__(self, dim: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.activation = resolve_activation(activation)
        self.linear = nn.Linear(dim, hidden, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x ``(..., D)``. Returns the same shape."""
        parts = (self.linear(x), self.gate(x), self.up(x))
        return self.down(hidden_from_parts(self.activation, parts))
