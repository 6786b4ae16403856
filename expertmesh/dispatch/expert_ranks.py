"""Which rank of a group holds which experts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertRanks:
    """Experts dealt out over the ``(ep, etp)`` ranks of a group, slices innermost.

    Rank ``(p, s)`` holds hidden slice ``s`` of experts ``p * L`` to ``(p + 1) * L - 1``.

    Attributes:
        num_experts: E.
        ep: Ranks among which experts are dealt out; divides E.
        etp: Slices of each expert.
    """

    num_experts: int
    ep: int
    etp: int

    @property
    def num_local(self) -> int:
        """L, the experts of one rank."""
        return self.num_experts // self.ep

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return self.ep * self.etp

    def destinations(self, expert_TK: Tensor) -> Tensor:
        """The ranks that a token goes to, each once.

        Args:
            expert_TK: int64; E marks choices that are not carried out.

        Returns:
            int64 ``(T, J)``, J the lesser of the group's ranks and ``K * etp``: sums over a
            token's rows read J of them. ``num_ranks`` where there is nothing to send.
        """
        owner_TK = expert_TK // self.num_local
        if self.ep <= expert_TK.shape[1]:
            rank_J = torch.arange(self.num_ranks, device=expert_TK.device)
            goes_TJ = (owner_TK.unsqueeze(2) == rank_J // self.etp).any(dim=1)
            return torch.where(goes_TJ, rank_J, self.num_ranks)
        # A rank that an earlier choice of the token named already is left out.
        same_TKK = owner_TK.unsqueeze(2) == owner_TK.unsqueeze(1)
        owner_TK = owner_TK.masked_fill(same_TKK.tril(-1).any(dim=2), self.ep)
        slice_S = torch.arange(self.etp, device=expert_TK.device)
        rank_TKS = owner_TK.unsqueeze(2) * self.etp + slice_S
        return rank_TKS.clamp_max(self.num_ranks).flatten(1)

    def localize(self, expert_RK: Tensor, rank: int) -> Tensor:
        """Global expert ids as ids among the L of one rank; L for those of other ranks."""
        id_RK = expert_RK - rank // self.etp * self.num_local
        here_RK = (id_RK >= 0) & (id_RK < self.num_local)
        return torch.where(here_RK, id_RK, self.num_local)
