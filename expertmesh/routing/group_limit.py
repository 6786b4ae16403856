"""Selection limited to the best groups of experts (DeepSeek-V2, V3)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.routing.checks import check_option
from expertmesh.routing.selection import top_k

GroupScore = Literal["max", "top2_sum"]


@dataclass(frozen=True, kw_only=True)
class GroupLimit:
    """Choose only among the experts of each token's best groups.

    Attributes:
        num_groups: Equal groups of consecutive experts.
        kept: Groups that stay open to each token.
        score: A group's score: ``"max"`` of its experts (DeepSeek-V2, arXiv 2405.04434, 2.2.2) or
            ``"top2_sum"`` of its two best (DeepSeek-V3, arXiv 2412.19437, 2.1.2 and its code).
    """

    num_groups: int
    kept: int
    score: GroupScore = "top2_sum"

    def __post_init__(self) -> None:
        check_option("group limit score", self.score, get_args(GroupScore))

    def check(self, num_experts: int, k: int) -> None:
        """Refuse numbers that don't fit together.

        Raises:
            ValueError: Naming them.
        """
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise UserError(
                f"num_experts must be a multiple of num_groups={self.num_groups}, got {num_experts}"
            )
        if not 1 <= self.kept <= self.num_groups:
            raise UserError(
                f"kept groups must be between 1 and num_groups={self.num_groups}, got {self.kept}"
            )
        size = num_experts // self.num_groups
        if self.kept * size < k:
            raise UserError(
                f"k must be at most {self.kept * size}, the experts of kept={self.kept} groups of "
                f"{size}; got k={k}"
            )
        if self.score == "top2_sum" and size < 2:
            raise UserError(
                f"score='top2_sum' needs at least 2 experts in a group, got {size}; set score='max'"
            )

    def mask(self, score_TE: Tensor) -> Tensor:
        """Scores with closed groups at -inf; ``(T, E)`` to ``(T, E)``."""
        num_tokens, num_experts = score_TE.shape
        score_TGM = score_TE.view(num_tokens, self.num_groups, num_experts // self.num_groups)
        best = 1 if self.score == "max" else 2
        group_TG = score_TGM.topk(best, dim=-1).values.sum(dim=-1)
        open_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        open_TG.scatter_(1, top_k(group_TG, self.kept), True)
        return torch.where(open_TG[:, :, None], score_TGM, -torch.inf).view_as(score_TE)
