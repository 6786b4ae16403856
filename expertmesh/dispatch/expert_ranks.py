"""Which rank of a group holds which experts."""

from dataclasses import dataclass

from torch import Tensor

from expertmesh.kernels.dispatch import destinations


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
        return destinations(expert_TK, self.num_local, self.ep, self.etp)

    def first(self, rank: int) -> int:
        """The first of a rank's L experts."""
        return rank // self.etp * self.num_local
