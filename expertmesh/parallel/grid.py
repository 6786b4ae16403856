"""The two grids over one set of ranks: arithmetic, without any process.

Of every pipeline stage the dense layers see the ranks as ``(dp, cp, tp)`` and the experts see the
same ranks as ``(edp, ep, etp)``, so ``dp * cp * tp == edp * ep * etp``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import numpy as np
import numpy.typing as npt

from expertmesh.errors import UserError

DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")
AXES = (*DENSE_AXES, *EXPERT_AXES[1:])

Placement = Literal["inside", "outside"]
"""Where the ranks of one expert-parallel group lie: beside each other (``"inside"`` a host, with
the copies of an expert on other hosts), or far apart (``"outside"``, with the copies of an expert
beside each other, so that only the all-to-all crosses hosts)."""

Ranks = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    """Which rank stands where.

    Attributes:
        dense: Rank numbers ``(pp, dp, cp, tp)``.
        expert: The same ranks ``(pp, edp, ep, etp)``.
        placement: How the expert grid was laid over them.
    """

    dense: Ranks
    expert: Ranks
    placement: Placement

    @staticmethod
    def infer(
        world: int,
        *,
        pp: int = 1,
        dp: int = -1,
        cp: int = 1,
        tp: int = 1,
        edp: int = -1,
        ep: int = 1,
        etp: int = 1,
        placement: Placement = "inside",
        ranks: Sequence[int] | None = None,
    ) -> "Grid":
        """Lay both grids over the ranks.

        Args:
            world: Number of ranks.
            pp: Pipeline stages.
            dp: Data-parallel replicas of the dense layers; -1 takes what is left.
            cp: Slices of the sequence.
            tp: Slices of attention.
            edp: Replicas of each expert; -1 takes what is left.
            ep: Ranks among which the experts are dealt out.
            etp: Slices of each expert's hidden units.
            placement: See ``Placement``.
            ranks: Their numbers; None counts from 0.

        Raises:
            UserError: If the degrees are no whole numbers, or do not multiply to the world; naming
                what would.
        """
        given = {"pp": pp, "dp": dp, "cp": cp, "tp": tp, "edp": edp, "ep": ep, "etp": etp}
        _check_degrees(given, placement)
        stage = _quotient(world, {"pp": pp}, f"{world} ranks")
        dp = _fit(stage, "dp", dp, {"cp": cp, "tp": tp}, world, pp)
        edp = _fit(stage, "edp", edp, {"ep": ep, "etp": etp}, world, pp)
        numbers = np.arange(world) if ranks is None else np.asarray(ranks, dtype=np.int64)
        if len(numbers) != world or len(set(numbers.tolist())) != world:
            raise UserError(f"ranks must be {world} different numbers, got {numbers.tolist()}")
        if placement == "inside":
            expert = numbers.reshape(pp, edp, ep, etp)
        else:
            expert = numbers.reshape(pp, ep, edp, etp).swapaxes(1, 2)
        return Grid(numbers.reshape(pp, dp, cp, tp), np.ascontiguousarray(expert), placement)

    @property
    def degrees(self) -> dict[str, int]:
        """The size of every axis."""
        dense = dict(zip(DENSE_AXES, self.dense.shape, strict=True))
        return dense | dict(zip(EXPERT_AXES, self.expert.shape, strict=True))

    @property
    def world(self) -> int:
        """Number of ranks."""
        return int(self.dense.size)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world // self.dense.shape[0]

    def groups(self, axes: str | Sequence[str]) -> list[list[int]]:
        """The sets of ranks that differ in these axes only, each in the axes' order.

        Args:
            axes: One axis, or several of one grid, the slowest first.
        """
        names = (axes,) if isinstance(axes, str) else tuple(axes)
        ranks, order = self._grid_of(names)
        picked = [order.index(name) for name in names]
        rest = [dim for dim in range(4) if dim not in picked]
        size = math.prod(ranks.shape[dim] for dim in picked)
        return ranks.transpose(*rest, *picked).reshape(-1, size).tolist()

    def group_of(self, rank: int, axes: str | Sequence[str]) -> list[int]:
        """The one of ``groups(axes)`` that holds ``rank``."""
        return next(group for group in self.groups(axes) if rank in group)

    def coordinates(self, rank: int) -> dict[str, int]:
        """The rank's place along every axis."""
        places: dict[str, int] = {}
        for ranks, axes in ((self.dense, DENSE_AXES), (self.expert, EXPERT_AXES)):
            place = np.argwhere(ranks == rank)[0].tolist()
            places |= dict(zip(axes, place, strict=True))
        return places

    def check_experts(self, num_experts: int) -> None:
        """Refuse a number of experts that cannot be dealt out evenly.

        Raises:
            UserError: Naming the degrees that would work.
        """
        ep = self.degrees["ep"]
        if num_experts % ep:
            each = self.degrees["etp"] * ep
            fitting = [d for d in range(1, min(num_experts, each) + 1)
                       if num_experts % d == 0 and self.stage_size % d == 0]  # fmt: skip
            raise UserError(
                f"ep must divide the number of experts, got ep={ep} for {num_experts} experts; "
                f"set ep to one of {fitting}; ranks beyond them can slice hidden units (etp) or "
                "hold copies (edp)"
            )

    def describe(self) -> str:
        """Both grids with the ranks of every group of more than one."""
        degrees = self.degrees
        lines = []
        for title, axes in (("dense", DENSE_AXES), ("expert", EXPERT_AXES)):
            shape = " x ".join(f"{axis}={degrees[axis]}" for axis in axes)
            lines.append(f"{title:<7}{shape}")
            for axis in axes:
                if degrees[axis] > 1 and not (title == "expert" and axis == "pp"):
                    lines.append(f"  {axis:<4} {_listed(self.groups(axis))}")
        return "\n".join(lines)

    def _grid_of(self, names: Sequence[str]) -> tuple[Ranks, tuple[str, ...]]:
        for ranks, axes in ((self.dense, DENSE_AXES), (self.expert, EXPERT_AXES)):
            if all(name in axes for name in names):
                return ranks, axes
        raise UserError(
            f"axes must all be of {', '.join(DENSE_AXES)} or all of {', '.join(EXPERT_AXES)}, "
            f"got {', '.join(names)}"
        )


def _check_degrees(given: dict[str, int], placement: str) -> None:
    for axis, degree in given.items():
        if not _is_whole_number(degree):
            raise UserError(
                f"{axis} must be a whole number, got {degree!r} of type {type(degree).__name__}; "
                f"set {axis} = 1 or the like"
            )
        inferable = axis in ("dp", "edp")
        if degree < 1 and not (inferable and degree == -1):
            either = ", or -1 for what is left" if inferable else ""
            raise UserError(f"{axis} must be at least 1{either}, got {degree}; set {axis} = 1")
    if placement not in ("inside", "outside"):
        raise UserError(f"placement must be 'inside' or 'outside', got {placement!r}")


def _is_whole_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _product(degrees: dict[str, int]) -> str:
    return " * ".join(f"{axis}={degree}" for axis, degree in degrees.items())


def _quotient(number: int, degrees: dict[str, int], what: str) -> int:
    divisor = math.prod(degrees.values())
    if number % divisor:
        raise UserError(f"{_product(degrees)} does not divide {what}; {_advice(number, degrees)}")
    return number // divisor


def _advice(number: int, degrees: dict[str, int]) -> str:
    """For the largest axis, the nearest degree that fits with the others as they are."""
    axis = max(degrees, key=lambda name: degrees[name])
    rest = math.prod(degree for name, degree in degrees.items() if name != axis)
    if number % rest:
        return f"their product must divide {number}"
    fits = [d for d in range(1, number // rest + 1) if (number // rest) % d == 0]
    nearest = min(fits, key=lambda d: abs(d - degrees[axis]))
    return f"set {axis} = {nearest}, or start a multiple of {rest * degrees[axis]} ranks"


def _fit(stage: int, axis: str, degree: int, others: dict[str, int], world: int, pp: int) -> int:
    """The degree of the axis that may be inferred, checked against the stage."""
    what = f"the {stage} ranks of a pipeline stage ({world} ranks, pp={pp})"
    left = _quotient(stage, others, what)
    if degree in (-1, left):
        return left
    raise UserError(
        f"{axis}={degree} * {_product(others)} is {degree * math.prod(others.values())}, but a "
        f"pipeline stage has {stage} ranks ({world} ranks, pp={pp}); set {axis} = {left}, or -1"
    )


def _listed(groups: list[list[int]], most: int = 8) -> str:
    shown = " ".join("{" + ",".join(map(str, group)) + "}" for group in groups[:most])
    rest = len(groups) - most
    return shown + (f" and {rest} more" if rest > 0 else "")
