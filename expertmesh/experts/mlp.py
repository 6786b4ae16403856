"""Plain MLP experts: ``down(activation(up(x)))``."""

from torch import Tensor, nn

from expertmesh.experts.stacked import StackedMLPExperts


class MLPExperts(StackedMLPExperts):
    """Two projections with an activation between, as in Switch Transformers and GShard.

    Arguments are ``StackedMLPExperts``'; the activation is relu unless given.

    Attributes:
        up: ``(E, F, D)``.
        down: ``(E, D, F)``.
        up_bias: ``(E, F)``, or None.
        down_bias: ``(E, D)``, or None.
    """

    up_name, up_parts, default_activation = "up", (), "relu"

    up: nn.Parameter
    up_bias: nn.Parameter | None

    @property
    def projection(self) -> tuple[Tensor, Tensor | None]:
        return self.up, self.up_bias
