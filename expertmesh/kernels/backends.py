"""Which implementation of an operation runs: chosen by device, dtype and size, or by the user.

An operation lists its backends from the most to the least specialised. ``auto`` takes the first
that can run the problem and suits it; where none suits, the first that can run it. A forced
backend that cannot run is an error that says why.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from expertmesh.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the choice may depend on: no values of tensors, so that it costs no synchronisation.

    Attributes:
        device: Where the tensors lie.
        dtype: What the matrix products run in.
        num_experts: E.
        num_assignments: N, rows times choices.
        dim: D, the rows' width.
        hidden: F, the experts' hidden width.
        needs_grad: Whether a backward pass may follow.
        num_parts: Projections that are multiplied: 1, 2 if gated, 3 if doubly gated.
        activation: Its name in ``ACTIVATIONS``; None for a callable of the user's own.
        dropout: Whether hidden units are dropped.
        compiling: Whether ``torch.compile`` is tracing.
        capturing: Whether a CUDA graph is being recorded.
    """

    device: torch.device
    dtype: torch.dtype
    num_experts: int
    num_assignments: int
    dim: int
    hidden: int
    needs_grad: bool
    num_parts: int = 2
    activation: str | None = "silu"
    dropout: bool = False
    compiling: bool = False
    capturing: bool = False


class Backend(ABC):
    """One implementation of an operation; the operation's own subclass adds ``run``."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def refusal(self, problem: Problem) -> str | None:
        """Why this backend cannot run the problem; None if it can."""

    @abstractmethod
    def suits(self, problem: Problem) -> bool:
        """Whether ``auto`` should take this backend for a problem that it can run."""


BackendT = TypeVar("BackendT", bound=Backend)


def choose(backends: Sequence[BackendT], problem: Problem, name: str = "auto") -> BackendT:
    """Pick the backend that runs a problem.

    Args:
        backends: The operation's, most specialised first.
        problem: What is to be run.
        name: ``"auto"``, or the name of the one to force.

    Raises:
        ValueError: If the name is unknown, or the forced backend cannot run the problem.
    """
    if name == "auto":
        able = None
        for backend in backends:  # asked in turn: each answer costs the host time at every call
            if backend.refusal(problem) is None:
                if backend.suits(problem):
                    return backend
                able = able or backend
        if able is None:
            where = " in a recorded CUDA graph" if problem.capturing else ""
            reasons = "; ".join(
                f"{backend.name}: {backend.refusal(problem)}" for backend in backends
            )
            raise ValueError(
                f"no backend runs {problem.dtype} on {problem.device}{where}; {reasons}"
            )
        return able
    check_backend(backends, name)
    forced = next(backend for backend in backends if backend.name == name)
    reason = forced.refusal(problem)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot run this: {reason}; set backend='auto'")
    return forced


def check_backend(backends: Sequence[Backend], name: str) -> None:
    """Refuse a name that is neither ``"auto"`` nor that of a backend.

    Raises:
        ValueError: With the names.
    """
    names = ["auto", *(backend.name for backend in backends)]
    if name not in names:
        raise UserError(
            f"backend must be one of {', '.join(names)}, got {name!r}{nearest(str(name), names)}"
        )


@dataclass(frozen=True)
class Explanation(Generic[BackendT]):
    """What would run for one problem, and why the others would not."""

    problem: Problem
    chosen: BackendT
    reasons: dict[str, str]


def explain(backends: Sequence[BackendT], problem: Problem) -> Explanation[BackendT]:
    """Say what ``auto`` picks and, for each other backend, why it is not picked.

    Args:
        backends: The operation's, most specialised first.
        problem: What would be run.
    """
    chosen = choose(backends, problem)
    reasons = {}
    for backend in backends:
        if backend is not chosen:
            reasons[backend.name] = backend.refusal(problem) or (
                "can run, another is earlier in the list"
                if backend.suits(problem)
                else "can run, expected to be slower"
            )
    return Explanation(problem, chosen, reasons)
