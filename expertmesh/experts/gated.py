"""Gated MLP experts: ``down(activation(gate(x)) * up(x))`` (Shazeer, 2020)."""

from torch import Tensor, nn

from expertmesh.experts.stacked import StackedMLPExperts


class GatedMLPExperts(StackedMLPExperts):
    """Gate and up projection, product, down projection, as in Mixtral and most models since.

    Arguments are ``StackedMLPExperts``'. The activation is the gate's, silu unless given; or
    ``clamped_swiglu``, gpt-oss's of both halves.

    Attributes:
        gate_up: ``(E, 2, F, D)``, the gate at index 0.
        down: ``(E, D, F)``.
        gate_up_bias: ``(E, 2, F)``, or None.
        down_bias: ``(E, D)``, or None.
    """

    up_name, up_parts, default_activation = "gate_up", (2,), "silu"

    gate_up: nn.Parameter
    gate_up_bias: nn.Parameter | None

    @property
    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.gate_up, self.gate_up_bias
