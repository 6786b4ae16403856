"""Plain MLP experts: ``down(activation(up(x)))``."""

import torch
from torch import Tensor, nn

from expertmesh.experts.stacked import StackedMLPExperts
from expertmesh.kernels.activations import Activation
from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.shards import local


class MLPExperts(StackedMLPExperts):
    """Two projections with an activation between, as in Switch Transformers and GShard.

    Args:
        dim: Width D of the rows.
        hidden: Hidden width F of one expert.
        num_experts: Number of experts E.
        activation: silu, gelu, gelu_tanh, relu, relu2, or any elementwise callable without
            parameters.
        bias: Whether both projections have biases.
        init_std: Standard deviation of all weights; None takes ``D ** -0.5`` for ``up`` and
            ``F ** -0.5`` for ``down``, which keeps the size of what passes through. Biases are 0.
        dropout: Probability that training drops a hidden unit (Switch's expert dropout,
            arXiv 2101.03961, 2.4: 0.4 in fine-tuning, with 0.1 elsewhere).
        seed: Governs the initial values; None draws one from torch's generator.
        backend: ``"auto"``, or a name that ``expertmesh doctor`` lists.
        device: Where the parameters lie. On ``meta`` nothing is drawn; call
            ``reset_parameters(seed)`` after ``to_empty``.
        dtype: Of the parameters.

    Attributes:
        up: ``(E, F, D)``.
        down: ``(E, D, F)``.
        up_bias: ``(E, F)``, or None.
        down_bias: ``(E, D)``, or None.
    """

    up: nn.Parameter
    down: nn.Parameter
    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str | Activation = "relu",
        bias: bool = False,
        init_std: float | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            hidden,
            num_experts,
            activation=activation,
            init_std=init_std,
            dropout=dropout,
            backend=backend,
        )
        shapes: dict[str, tuple[int, ...]] = {
            "up": (num_experts, hidden, dim),
            "down": (num_experts, dim, hidden),
        }
        biases: dict[str, tuple[int, ...]] = {
            "up_bias": (num_experts, hidden),
            "down_bias": (num_experts, dim),
        }
        self._register(shapes, biases, bias=bias, device=device, dtype=dtype)
        self._draw(seed, self.up)

    @property
    def fan_in(self) -> dict[str, int]:
        return {"up": self.dim, "down": self.hidden}

    @property
    def hidden_dims(self) -> dict[str, int | None]:
        return {"up": 1, "down": 2, "up_bias": 1, "down_bias": None}

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        self._check(x_RD)
        return moe_mlp(
            x_RD,
            expert_RK,
            weight_RK,
            local(self.up),
            local(self.down),
            up_bias=self._own(self.up_bias),
            down_bias=self._output_bias(self.down, self.down_bias),
            activation=self.activation,
            backend=self.backend,
            **self._drop(draw_R, x_RD),
        )
