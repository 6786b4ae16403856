"""Named choices of a mesh: those of OpenMoE's trainer.

A strategy is a function of the numbers of ranks and experts, not a way of computing: it names
degrees and ZeRO stages that could be given one by one.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from expertmesh.errors import UserError, nearest
from expertmesh.parallel.grid import Placement


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Degrees and stages.

    Attributes:
        pp: Pipeline stages.
        ep: Ranks among which experts are dealt out.
        placement: Where the ranks of an expert-parallel group lie.
        zero: Stage of all but the experts.
        expert_zero: Stage of the experts.
    """

    pp: int = 1
    ep: int
    placement: Placement = "inside"
    zero: int
    expert_zero: int


def experts_everywhere(world: int, num_experts: int) -> Strategy:
    """``ep``: experts over as many ranks as can be, ZeRO 2 for the rest; the least memory."""
    return Strategy(ep=math.gcd(world, num_experts), zero=2, expert_zero=2)


def copies_beside_each_other(world: int, num_experts: int, copies: int = 2) -> Strategy:
    """``ep_zero``: each expert on ``copies`` neighbouring ranks, which share its ZeRO pieces.

    Only the all-to-all leaves a group of neighbours, and ranks hold more experts each, which
    evens out their load. For general use; ``copies`` at most the ranks of a host.
    """
    if world % copies:
        raise UserError(
            f"ep_zero needs a multiple of {copies} ranks, got {world}; set mesh.ep yourself"
        )
    ep = math.gcd(world // copies, num_experts)
    return Strategy(ep=ep, placement="outside", zero=1, expert_zero=1)


def two_stages(world: int, num_experts: int) -> Strategy:
    """``hybrid``: two pipeline stages, experts over the ranks of each; for the largest models."""
    if world % 2:
        raise UserError(f"hybrid needs an even number of ranks, got {world}; set mesh.pp yourself")
    return Strategy(pp=2, ep=math.gcd(world // 2, num_experts), zero=1, expert_zero=1)


STRATEGIES: dict[str, Callable[[int, int], Strategy]] = {
    "ep": experts_everywhere,
    "ep_zero": copies_beside_each_other,
    "hybrid": two_stages,
}
"""By the name that OpenMoE's trainer gives them."""


def strategy(name: str, world: int, num_experts: int) -> Strategy:
    """The strategy of a name.

    Args:
        name: A key of ``STRATEGIES``.
        world: Number of ranks.
        num_experts: E.

    Raises:
        UserError: If the name is unknown, or the strategy does not fit the ranks.
    """
    if name not in STRATEGIES:
        raise UserError(
            f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}"
            + nearest(name, STRATEGIES)
        )
    return STRATEGIES[name](world, num_experts)
