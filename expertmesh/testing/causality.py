"""Does a module let later tokens reach earlier outputs?

A causal decoder may only see the past: its training loss is contaminated by whatever lets the
future through, and generation, which has no future, then computes something else.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.testing.compare import relative_error

_BATCH, _LENGTH = 2, 32
# Earlier outputs are the same numbers or rounded differently (their experts' products change in
# shape); float64 leaves ten digits between that and a choice that changed.
_ROUNDING = 1e-10


class _Change(NamedTuple):
    """Tokens of one sequence, from a position on, become others."""

    row: int
    cut: int
    crowd: bool
    source: int
    seed: int


def is_causal(
    module: nn.Module,
    x: Tensor | None = None,
    *,
    training: bool = False,
    tries: int = 16,
    seed: int = 0,
    **inputs: Tensor,
) -> bool:
    """Whether no output of a sequence moved when later tokens of the same sequence were changed.

    A probe: False shows a leak, True that none was seen in so many tries. Half of them put random
    tokens in the place of the later ones, half put copies of one earlier token there, which crowd
    its experts. Other sequences of the batch stay as they are, so that what they do to each other
    (a capacity shared by the micro-batch) does not count.

    Outputs are looked at, not gradients: balance losses that a layer attaches would look like leaks
    there. The probe runs on a copy in float64 without gradient, and draws the same random numbers
    each time, so routing noise and dropout are no leaks either.

    Args:
        module: A layer or a model from ``(B, S, D)`` or token ids ``(B, S)`` to ``(B, S, ...)``; if
            it returns a tuple, its first element counts.
        x: What to give it, finite. None makes two sequences of 32 tokens, for modules that have a
            ``dim``, a ``router.dim`` (numbers) or a ``config.vocab_size`` (ids).
        training: The mode: True leaves in what acts in training only (noise, capacity).
        tries: Changes to try.
        seed: Of the probe's random numbers.
        inputs: Further arguments of ``module``, ``(B, S, ...)``, such as ``token_ids``. They change
            where ``x`` does, apart from bool ones, which stay.

    Raises:
        ValueError: If there is no example to try, or shapes do not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Tensor] = {"x": _example(module, generator) if x is None else x, **inputs}
    num_rows, length = _check(given, tries)
    probe = copy.deepcopy(module).double().train(training)
    buffers = [buffer.clone() for buffer in probe.buffers()]

    def outputs(changed: dict[str, Tensor]) -> Tensor:
        for buffer, start in zip(probe.buffers(), buffers, strict=True):
            buffer.copy_(start)
        return _run(probe, changed, seed)

    with torch.no_grad():
        before = outputs(given)
        _check_output(before, num_rows, length)
        for number in range(tries):
            change = _draw(number, num_rows, length, generator)
            after = outputs({name: _changed(value, change) for name, value in given.items()})
            past = (change.row, slice(0, change.cut))
            if not relative_error(after[past], before[past]) <= _ROUNDING:
                return False
    return True


def _run(probe: nn.Module, given: dict[str, Tensor], seed: int) -> Tensor:
    wide = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    x = wide.pop("x")
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        y = probe(x, **wide)
    first: Tensor = y[0] if isinstance(y, tuple) else y
    return first


def _draw(number: int, num_rows: int, length: int, generator: torch.Generator) -> _Change:
    def below(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    cut = 1 + below(length - 1)
    return _Change(number % num_rows, cut, number // num_rows % 2 == 1, below(cut), below(1 << 62))


def _changed(value: Tensor, change: _Change) -> Tensor:
    """A copy of ``(B, S, ...)`` in which one sequence has another future."""
    if value.dtype == torch.bool:
        return value
    value = value.clone()
    later = value[change.row, change.cut :]
    if change.crowd:
        # Louder where tokens are numbers: orders that look at weights then serve these first.
        loudness = 3 if value.is_floating_point() else 1
        later.copy_((loudness * value[change.row, change.source]).expand_as(later))
        return value
    generator = torch.Generator().manual_seed(change.seed)
    if value.is_floating_point():
        noise = torch.randn(later.shape, generator=generator, dtype=torch.float64)
        later.copy_(noise.to(value.device) * 2 * value.square().mean().sqrt())
    else:
        # Ids that are there are ids that are allowed.
        place = torch.randint(value.numel(), later.shape, generator=generator)
        later.copy_(value.flatten()[place.to(value.device)])
    return value


def _example(module: nn.Module, generator: torch.Generator) -> Tensor:
    parameter = next(module.parameters(), None)
    device = None if parameter is None else parameter.device
    config: Any = getattr(module, "config", None)
    if hasattr(config, "vocab_size"):
        ids = torch.randint(config.vocab_size, (_BATCH, _LENGTH), generator=generator)
        return ids.to(device)
    dim = getattr(getattr(module, "router", module), "dim", None)
    if not isinstance(dim, int) or dim < 1:
        raise UserError(
            f"x must be given for a {type(module).__name__}: it has neither a dim, nor a router, "
            "nor a config.vocab_size from which to make an example"
        )
    return torch.randn(_BATCH, _LENGTH, dim, generator=generator).to(device)


def _check(given: dict[str, Tensor], tries: int) -> tuple[int, int]:
    if tries < 1:
        raise UserError(f"tries must be at least 1, got {tries}")
    x = given["x"]
    wanted = 3 if x.is_floating_point() else 2
    if x.dim() != wanted or x.shape[0] == 0 or x.shape[1] < 2:
        raise UserError(
            f"x must be (B, S, D) numbers or (B, S) ids with B >= 1 and S >= 2, "
            f"got {tuple(x.shape)} {x.dtype}"
        )
    for name, value in given.items():
        if value.shape[:2] != x.shape[:2]:
            raise UserError(
                f"{name} must begin with x's batch and sequence {tuple(x.shape[:2])}, "
                f"got {tuple(value.shape)}"
            )
    return x.shape[0], x.shape[1]


def _check_output(y: Tensor, num_rows: int, length: int) -> None:
    if y.shape[:2] != (num_rows, length):
        raise UserError(
            f"the module must answer with (B, S, ...) = ({num_rows}, {length}, ...), "
            f"got {tuple(y.shape)}"
        )
    if not bool(y.isfinite().all()):
        raise UserError("the module's output must be finite to be compared; give another x")
