"""Gated MLP experts: ``down(activation(gate(x)) * up(x))`` (Shazeer, 2020)."""

import torch
from torch import Tensor, nn

from expertmesh.experts.stacked import StackedMLPExperts
from expertmesh.kernels.activations import Activation
from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.shards import local


class GatedMLPExperts(StackedMLPExperts):
    """Gate and up projection, product, down projection, as in Mixtral and most models since.

    Args:
        dim: Width D of the rows.
        hidden: Hidden width F of one expert.
        num_experts: Number of experts E.
        activation: Of the gate: silu, gelu, gelu_tanh, relu, relu2, or any elementwise callable
            without parameters; or ``clamped_swiglu``, gpt-oss's of both halves.
        bias: Whether all projections have biases.
        init_std: Standard deviation of all weights; None takes ``D ** -0.5`` for ``gate_up``
            and ``F ** -0.5`` for ``down``. Biases are 0.
        dropout: Probability that training drops a hidden unit (Switch's expert dropout,
            arXiv 2101.03961, 2.4: 0.4 in fine-tuning, with 0.1 elsewhere).
        seed: Governs the initial values; None draws one from torch's generator.
        backend: ``"auto"``, or a name that ``expertmesh doctor`` lists.
        device: Where the parameters lie. On ``meta`` nothing is drawn; call
            ``reset_parameters(seed)`` after ``to_empty``.
        dtype: Of the parameters.

    Attributes:
        gate_up: ``(E, 2, F, D)``, the gate at index 0.
        down: ``(E, D, F)``.
        gate_up_bias: ``(E, 2, F)``, or None.
        down_bias: ``(E, D)``, or None.
    """

    gate_up: nn.Parameter
    down: nn.Parameter
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str | Activation = "silu",
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
            "gate_up": (num_experts, 2, hidden, dim),
            "down": (num_experts, dim, hidden),
        }
        biases: dict[str, tuple[int, ...]] = {
            "gate_up_bias": (num_experts, 2, hidden),
            "down_bias": (num_experts, dim),
        }
        self._register(shapes, biases, bias=bias, device=device, dtype=dtype)
        self._draw(seed, self.gate_up)

    @property
    def fan_in(self) -> dict[str, int]:
        return {"gate_up": self.dim, "down": self.hidden}

    @property
    def hidden_dims(self) -> dict[str, int | None]:
        return {"gate_up": 2, "down": 2, "gate_up_bias": 2, "down_bias": None}

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        self._check(x_RD)
        return moe_mlp(
            x_RD,
            expert_RK,
            weight_RK,
            local(self.gate_up),
            local(self.down),
            up_bias=self._own(self.gate_up_bias),
            down_bias=self._output_bias(self.down, self.down_bias),
            activation=self.activation,
            backend=self.backend,
            **self._drop(draw_R, x_RD),
        )
