"""Whether files and configurations are what a model needs, with every difference named."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from expertmesh.convert.layout import Layout
from expertmesh.convert.source import Stored
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig

# A number between separators: of a block, an expert.
_NUMBER = re.compile(r"(?<=[./_])(\d+)(?=[./_])")


def check_tensors(
    layout: Layout, shapes: Mapping[str, tuple[int, ...]], where: str, *, hint: str = ""
) -> None:
    """Compare the tensors that are there with those of a layout.

    Args:
        layout: What is expected.
        shapes: What there is, by name.
        where: That is, for the message.
        hint: What to set.

    Raises:
        UserError: Naming every tensor that is missing, unexpected or misshapen.
    """
    expected = layout.their_shapes
    faults = []
    if missing := [name for name in expected if name not in shapes]:
        faults.append(f"missing: {named(missing)}")
    if extra := [name for name in shapes if name not in expected]:
        faults.append(f"unexpected: {named(extra)}")
    misshapen: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            misshapen.setdefault((shape, shapes[name]), []).append(name)
    faults += [
        f"misshapen: {named(names)} (expected {list(shape)}, got {list(got)})"
        for (shape, got), names in misshapen.items()
    ]
    if faults:
        raise UserError(f"{where} does not fit the model; " + "; ".join(faults) + hint)


def check_floating(tensors: Mapping[str, Stored], where: str) -> None:
    """Raise if tensors hold whole numbers, which stand for weights in a way that is not known."""
    others = [name for name, stored in tensors.items() if not stored.dtype.is_floating_point]
    if others:
        dtypes = sorted({str(tensors[name].dtype) for name in others})
        raise UserError(
            f"{where} holds {' and '.join(dtypes)} in {named(others)}; expected floating point "
            "numbers, so give weights that are not quantized"
        )


def unlike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Where what is found is not what is wanted: ``mlp = 'gated' (expected 'doubly_gated')``.

    Args:
        found: Values by name; one that is not there differs from nothing.
        wanted: Likewise.

    Returns:
        All differences, or nothing.
    """
    return ", ".join(
        f"{name} = {found[name]!r} (expected {value!r})"
        for name, value in wanted.items()
        if name in found and found[name] != value
    )


def usual_experts(config: DecoderConfig) -> dict[str, Any]:
    """What ``expert_form`` must be: no key says that experts are of another model's form."""
    return {"expert_form": "plain" if config.expert_form == "plain" else "auto"}


def named(names: Iterable[str]) -> str:
    """All names, those that differ in one number only as one: ``layers.{0,2-5}.norm``."""
    groups: dict[tuple[str, ...], None] = {tuple(_NUMBER.split(name)): None for name in names}
    most = max((len(parts) for parts in groups), default=0)
    # Split names alternate text and number; the last number is joined first.
    for place in range(most - 2, 0, -2):
        joined: dict[tuple[str, ...], list[str]] = {}
        for parts in groups:
            if place < len(parts):
                rest = (*parts[:place], "", *parts[place + 1 :])
                joined.setdefault(rest, []).append(parts[place])
            else:
                joined.setdefault(parts, [])
        groups = {}
        for rest, numbers in joined.items():
            whole = (*rest[:place], _ranges(numbers), *rest[place + 1 :]) if numbers else rest
            groups[whole] = None
    return ", ".join("".join(parts) for parts in groups)


def _ranges(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) + "}"
