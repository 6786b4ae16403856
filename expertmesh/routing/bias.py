"""Balance without a loss: a bias on selection, moved once per optimizer step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.recompute import is_recompute
from expertmesh.routing.selection import count_experts


class SelectionBias(nn.Module):
    """A bias per expert that enters selection only, never the weights (arXiv 2408.15664).

    After each optimizer step ``b_e += rate * sign(mean load - load_e)``, loads counted exactly, in
    integers, since the last update. Padding and recompute are not counted.

    Args:
        num_experts: E.
        rate: Step of the bias; DeepSeek-V3 used 1e-3 and 0 towards the end.
    """

    bias_E: Tensor
    count_E: Tensor

    def __init__(
        self,
        num_experts: int,
        rate: float = 1e-3,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not rate >= 0:
            raise UserError(f"selection bias rate must be at least 0, got {rate}")
        self.rate = rate
        self.register_buffer("bias_E", torch.zeros(num_experts, device=device))
        # Saved too: a run resumed between two micro-batches goes on counting.
        self.register_buffer("count_E", torch.zeros(num_experts, dtype=torch.int64, device=device))

    def check(self, num_experts: int) -> None:
        """Refuse a router of another number of experts, over which one number would spread.

        Raises:
            ValueError: With both numbers.
        """
        if len(self.bias_E) != num_experts:
            raise UserError(
                f"bias must be made for num_experts={num_experts}, got SelectionBias("
                f"{len(self.bias_E)}); set SelectionBias({num_experts})"
            )

    def reset_parameters(self) -> None:
        """Start from zero."""
        self.bias_E.zero_()
        self.count_E.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelectionBias":
        # A model turned to bf16 keeps this bias in float32: steps of 1e-3 would vanish in it.
        exact_E = self.bias_E
        super()._apply(fn, recurse)
        if self.bias_E.dtype != exact_E.dtype:
            self.bias_E = exact_E.to(self.bias_E.device)
        return self

    def count(self, chosen_TK: Tensor) -> None:
        """Count choices of a training forward pass."""
        if self.training and not is_recompute():
            self.count_E += count_experts(chosen_TK, len(self.count_E))

    @torch.no_grad()
    def update(self, count_E: Tensor | None = None) -> None:
        """Move the bias by one step and start counting anew.

        Args:
            count_E: int64, counts of all ranks; None takes this rank's.
        """
        count_E = self.count_E if count_E is None else count_E
        total = count_E.sum()
        # sign(mean - count) in integers: exact whatever the number of tokens.
        self.bias_E += self.rate * torch.sign(total - count_E * len(count_E)).to(self.bias_E.dtype)
        self.count_E.zero_()


def update_selection_bias(
    model: nn.Module, reduce: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Update every selection bias of a model; call it once after each optimizer step.

    Args:
        model: Any module; without selection biases nothing happens.
        reduce: Sums the int64 counts of all layers, in one tensor, over ranks; None on one rank.
    """
    biases = [module for module in model.modules() if isinstance(module, SelectionBias)]
    if not biases:
        return
    counts = torch.cat([bias.count_E for bias in biases])
    if reduce is not None:
        counts = reduce(counts)
    parts = counts.split([len(bias.count_E) for bias in biases])
    for bias, count_E in zip(biases, parts, strict=True):
        bias.update(count_E)
