"""What a router decided."""

from dataclasses import dataclass, field

import torch.utils._pytree as pytree
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts take which tokens, with which weight. A pytree.

    Shapes are static: a choice that is not carried out keeps its place and names expert ``E``, the
    sentinel, with weight zero.

    Where tokens choose, row t of the tables is token t. Where experts choose, a token may be taken
    by any number of them: then there are N rows of one choice each, and ``token_N`` says whose
    they are; N stands for T in the shapes below, the logits' excepted.

    Attributes:
        num_experts: E.
        expert_TK: int64 ``(T, K)``; E where a choice was dropped, skipped, or belongs to padding.
        weight_TK: ``(T, K)``, float32 or wider; what multiplies the expert's output.
        chosen_TK: int64 ``(T, K)``; the k best, before any was skipped by rule or dropped.
        load_E: int64 ``(E,)``; choices that name each expert, those later dropped included.
        dropped_TK: bool ``(T, K)``; choices that overflowed their expert's capacity; None where
            experts take whatever comes.
        logits_TE: ``(T, E)`` router logits before noise on the logits, or None.
        losses: Balance losses by name, each with its coefficient; empty in evaluation.
        most_per_expert: A bound, known without looking, on the choices in ``expert_TK`` that name
            one expert; None where there is none.
        token_N: int64 ``(N,)``, the token of each row; None where rows are the tokens in order.
    """

    num_experts: int
    expert_TK: Tensor
    weight_TK: Tensor
    chosen_TK: Tensor
    load_E: Tensor
    dropped_TK: Tensor | None = None
    logits_TE: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    most_per_expert: int | None = None
    token_N: Tensor | None = None

    @property
    def num_tokens(self) -> int | None:
        """T; None where experts chose and there are no logits, which alone would tell."""
        if self.token_N is None:
            return len(self.expert_TK)
        return None if self.logits_TE is None else len(self.logits_TE)

    @property
    def num_dropped(self) -> Tensor:
        """int64 scalar; choices that overflowed their expert's capacity."""
        if self.dropped_TK is None:
            return self.chosen_TK.new_zeros(())
        return self.dropped_TK.sum()


pytree.register_dataclass(Routing)
