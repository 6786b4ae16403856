"""Experts of different structure."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from expertmesh.experts.base import Experts
from expertmesh.experts.module import expert_random_state
from expertmesh.experts.per_expert import run_per_expert, with_zero_gradients
from expertmesh.random import fresh_seed


class HeterogeneousExperts(Experts):
    """Modules that differ, as the experts of one layer.

    What is lost against the other families: parameters cannot be stacked, so there are no grouped
    products, no sharding of experts over an ``ep`` axis, no slicing of hidden units, and a
    checkpoint names each expert by itself (``modules_by_expert.3.weight``). Experts run one after
    another, and the slowest of them decides the time.

    Args:
        modules: One for each expert; each maps ``(n, D)`` to ``(n, D)``.
        dim: Width D of the rows.
    """

    hidden_separable = False

    def __init__(self, modules: Iterable[nn.Module], *, dim: int) -> None:
        listed = list(modules)
        if len({id(module) for module in listed}) != len(listed):
            raise ValueError("modules must be different objects, got one of them twice")
        super().__init__(len(listed), dim)
        self.modules_by_expert = nn.ModuleList(listed)

    def forward(
        self, x_RD: Tensor, expert_RK: Tensor, weight_RK: Tensor, draw_R: Tensor | None = None
    ) -> Tensor:
        self._check(x_RD)
        experts = self.modules_by_expert
        y_RD, idle = run_per_expert(
            lambda expert, rows: experts[expert](rows),
            x_RD,
            expert_RK,
            weight_RK,
            self.num_experts,
        )
        return with_zero_gradients(y_RD, [p for e in idle for p in experts[e].parameters()])

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Call ``reset_parameters`` of every part that has it, each expert under its own seed."""
        seed = fresh_seed() if seed is None else seed
        for expert, module in enumerate(self.modules_by_expert):
            with expert_random_state(seed, expert):
                for part in module.modules():
                    reset = getattr(part, "reset_parameters", None)
                    if callable(reset):
                        reset()

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, dim={self.dim}"
