"""Adafactor, the same on every mesh.

torch's own Adafactor takes means and norms over each tensor as it lies on a rank; of a parameter
in pieces these must be the whole parameter's. Here every rank adds what it holds to vectors as
long as the whole parameter's rows and columns, and two small sums over ranks make them whole.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from expertmesh.shards import Shard, shard_of

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh

Total = Callable[[Tensor], Tensor]
"""Sums a vector over all ranks that hold parts of the parameters."""
Copies = Callable[[Tensor], int]
"""On how many of those ranks the same numbers of a parameter lie."""

# Added to squared gradients, and least scale of a parameter (the paper's eps_1 and eps_2).
_SQUARE, _SCALE = 1e-30, 1e-3
_AT_ONCE = {"cpu": 2**22}
_AT_ONCE_ON_GPUS = 2**26
"""Numbers of an update that there are at a time: what a CPU's caches hold, and elsewhere 256 MiB,
for few launches."""


@final
class Adafactor(torch.optim.Optimizer):
    """Adafactor without momentum (Shazeer and Stern, 2018, arXiv 1804.04235, algorithm 4).

    A matrix's second moment is kept as the means of its rows and of its columns; of a stack of
    matrices each has its own. The step is relative to the parameter's root mean square, and the
    update's root mean square is at most 1 before that. The learning rate is used as it is given:
    the paper's ``min(0.01, 1 / sqrt(t))`` is the schedule's matter.

    The state is in float32, or in float64 of parameters that are.

    Args:
        groups: Parameters, with ``weight_decay`` (decoupled) by group.
        lr: Relative step size.
        decay: The second moment's decay at step t is ``1 - t ** -decay``.
        total: Sums over ranks; None is one process.
        copies: Counts equal parts over ranks; None is one process.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        decay: float = 0.8,
        total: Total | None = None,
        copies: Copies | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "decay": decay, "weight_decay": 0.0})
        self._total = total or (lambda vector: vector)
        self._copies = copies or (lambda _: 1)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        """Change every parameter that has a gradient."""
        works = [
            _Work.of(param, self._state_of(param), group, self._copies(param))
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        if not works:
            return
        self._sum(works, [work.squares() for work in works], _Work.take_squares)
        self._sum(works, [work.update_square() for work in works], _Work.take_update_square)
        for work in works:
            work.apply()

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            wide = _wide(param)
            if param.dim() < 2:
                state["square"] = torch.zeros_like(param, dtype=wide)
            else:
                *stack, rows, columns = param.shape
                state["rows"] = torch.zeros((*stack, rows), device=param.device, dtype=wide)
                state["columns"] = torch.zeros((*stack, columns), device=param.device, dtype=wide)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        super().load_state_dict(state_dict)
        # torch rounds what it loads to the parameter's dtype; the state of a narrow one is wide.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step":
                    self.state[param][key] = value.to(param.device, _wide(param))

    def _sum(
        self, works: list["_Work"], parts: list[Tensor], take: Callable[["_Work", Tensor], None]
    ) -> None:
        """Sum vectors over ranks, all in one message, and give each back."""
        shares = [part / work.copies for part, work in zip(parts, works, strict=True)]
        whole = self._total(torch.cat(shares)).split([len(part) for part in parts])
        for work, vector in zip(works, whole, strict=True):
            take(work, vector.to(work.wide))


def build_adafactor(
    groups: list[dict[str, Any]], *, lr: float, decay: float, mesh: "Mesh | None" = None
) -> Adafactor:
    """Adafactor over the parameters of a model that is laid out over a mesh.

    Args:
        groups: As torch's optimizers take them.
        lr: Learning rate.
        decay: See ``Adafactor``.
        mesh: What the model is laid out over; None is one process. Ranks of a stage hold parts of
            the same parameters.
    """
    if mesh is None:
        return Adafactor(groups, lr=lr, decay=decay)
    from expertmesh.dispatch.collectives import total
    from expertmesh.parallel.clip import copies

    return Adafactor(
        groups,
        lr=lr,
        decay=decay,
        total=partial(total, group=mesh.stage),
        copies=partial(copies, stage_size=mesh.grid.stage_size),
    )


@dataclass
class _Work:
    """One parameter in a step: this rank's box of it, and the whole's statistics."""

    box: Shard
    grad: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    copies: int
    numel: int
    wide: torch.dtype

    @staticmethod
    def of(param: Tensor, state: dict[str, Tensor], group: dict[str, Any], copies: int) -> "_Work":
        assert param.grad is not None
        state["step"] += 1
        grad = shard_of(param.grad).local
        return _Work(shard_of(param), grad, state, group, copies, param.numel(), _wide(param))

    def squares(self) -> Tensor:
        """Sums of squares of this box: the parameter's, then the gradient's rows and columns."""
        parts = [self._square(self.box.local).view(1)]
        if "square" not in self.state:
            for key, dim in (("rows", -1), ("columns", -2)):
                whole = torch.zeros_like(self.state[key])
                own = torch.linalg.vector_norm(self.grad, dim=dim, dtype=self.wide).square()
                whole[self._place(key)] = own
                parts.append(whole.flatten())
        return torch.cat(parts)

    def take_squares(self, total: Tensor) -> None:
        """Update the second moments from the whole parameter's sums of squares."""
        # Factors stay on the device: the host would wait for each of them.
        self.scale = (total[0] / self.numel).sqrt().clamp_min(_SCALE)
        weight = float(self.state["step"]) ** -self.group["decay"]
        if "square" in self.state:
            own = self.grad.to(self.wide).square().add_(_SQUARE)
            shard_of(self.state["square"]).local.lerp_(own, weight)
            return
        rows, columns = self.state["rows"], self.state["columns"]
        sums = total[1:].split([rows.numel(), columns.numel()])
        for state, other, vector in ((rows, columns, sums[0]), (columns, rows, sums[1])):
            mean = vector.view_as(state) / other.shape[-1] + _SQUARE
            state.lerp_(mean, weight)

    def update_square(self) -> Tensor:
        """The sum of squares of this box's update."""
        if "square" in self.state:
            return self._square(self.grad.to(self.wide) * self._by_number()).view(1)
        total = torch.zeros(1, device=self.grad.device, dtype=self.wide)
        for _, by_rows, by_column in self._parts(*self._by_rows_and_columns()):
            column = torch.linalg.vector_norm(by_rows, dim=-2)
            total += (column * by_column.squeeze(-2)).square().sum()
        return total

    def take_update_square(self, total: Tensor) -> None:
        """Remember the step's length, at which the update's root mean square is at most 1."""
        clip = (total[0] / self.numel).sqrt().clamp_min(1.0)
        self.length = self.group["lr"] * self.scale / clip

    def apply(self) -> None:
        """Change the parameter."""
        values = self.box.local
        if decay := self.group["lr"] * self.group["weight_decay"]:
            values.mul_(1 - decay)
        if "square" in self.state:
            update = self.grad.to(self.wide) * (self._by_number() * self.length)
            values.sub_(update.to(values.dtype))
            return
        by_row, by_column = self._by_rows_and_columns()
        for place, update, columns in self._parts(by_row * self.length, by_column):
            values[place].sub_(update.mul_(columns).to(values.dtype))

    def _square(self, values: Tensor) -> Tensor:
        """The sum of squares."""
        return torch.linalg.vector_norm(values, dtype=self.wide).square()

    def _by_number(self) -> Tensor:
        """What a vector's gradient is multiplied by."""
        return shard_of(self.state["square"]).local.rsqrt()

    def _by_rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """The same of a matrix in two factors, for this box's rows and columns."""
        rows, columns = self.state["rows"], self.state["columns"]
        by_row = (rows / rows.mean(-1, keepdim=True)).rsqrt()[self._place("rows")]
        return by_row, columns.rsqrt()[self._place("columns")]

    def _parts(
        self, by_row: Tensor, by_column: Tensor
    ) -> Iterator[tuple[tuple[int | slice, ...], Tensor, Tensor]]:
        """Where a part of the box lies, its gradient times its rows' factors, its columns' factors.

        Parts are some matrices of a stack or some rows of one: the whole is never in memory.
        """
        stack = self.grad.dim() - 2
        at_once = _AT_ONCE.get(self.grad.device.type, _AT_ONCE_ON_GPUS)
        for place in _slabs(tuple(self.grad.shape), at_once):
            by_rows = self.grad[place].to(self.wide, copy=True)
            by_rows.mul_(by_row[place].unsqueeze(-1))
            yield place, by_rows, by_column[place[:stack]].unsqueeze(-2)

    def _place(self, key: str) -> tuple[slice, ...]:
        """Where this box's rows or columns lie in the whole parameter's."""
        last = -2 if key == "rows" else -1
        begins = (*self.box.offset[:-2], self.box.offset[last])
        sizes = (*self.box.local.shape[:-2], self.box.local.shape[last])
        return tuple(slice(a, a + n) for a, n in zip(begins, sizes, strict=True))


def _wide(param: Tensor) -> torch.dtype:
    """What a parameter's statistics are in."""
    return torch.promote_types(param.dtype, torch.float32)


def _slabs(shape: tuple[int, ...], at_once: int) -> Iterator[tuple[int | slice, ...]]:
    """Places that together are a tensor, each of a few consecutive indices of one of its dims."""
    sizes = [max(1, math.prod(shape[dim + 1 :])) for dim in range(len(shape) - 1)]
    dim = next((dim for dim, size in enumerate(sizes) if size <= at_once), len(shape) - 2)
    count = max(1, at_once // sizes[dim])
    for outer in itertools.product(*(range(size) for size in shape[:dim])):
        for start in range(0, shape[dim], count):
            yield (*outer, slice(start, start + count))
