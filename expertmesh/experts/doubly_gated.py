"""Doubly gated MLP experts: ``down(linear(x) * activation(gate(x)) * up(x))``, OpenMoE's."""

from torch import Tensor, nn

from expertmesh.experts.stacked import StackedMLPExperts


class DoublyGatedMLPExperts(StackedMLPExperts):
    """Three projections, their product with one of them activated, and a down projection.

    OpenMoE (arXiv 2402.01739) has them since T5's list of activations named SwiGLU, itself a
    product of two, beside a linear one. Its published ``wi_gate`` holds linear and gate, ``wi_up``
    the third.

    Arguments are ``StackedMLPExperts``'. The activation is the gate's, silu unless given.

    Attributes:
        gates_up: ``(E, 3, F, D)``: linear, gate, up.
        down: ``(E, D, F)``.
        gates_up_bias: ``(E, 3, F)``, or None.
        down_bias: ``(E, D)``, or None.
    """

    up_name, up_parts, default_activation = "gates_up", (3,), "silu"

    gates_up: nn.Parameter
    gates_up_bias: nn.Parameter | None

    @property
    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.gates_up, self.gates_up_bias
