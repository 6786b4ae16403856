"""What constructors of routers refuse alike."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from expertmesh.errors import UserError, nearest


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


T = TypeVar("T", bound=_Dataclass)


def check_sizes(dim: int, num_experts: int, k: int = 1) -> None:
    """Refuse widths and counts that no router can have.

    Raises:
        ValueError: Naming the field.
    """
    check_whole(dim=dim, num_experts=num_experts, k=k)
    for field, value in (("dim", dim), ("num_experts", num_experts)):
        if value < 1:
            raise UserError(f"{field} must be at least 1, got {value}")
    if not 1 <= k <= num_experts:
        raise UserError(
            f"k must be between 1 and num_experts={num_experts}, got {k}; "
            f"set k <= {num_experts} or raise num_experts"
        )


def check_whole(**values: object) -> None:
    """Refuse numbers of things that are not whole, by the fields that they are given as.

    Raises:
        ValueError: Naming the field.
    """
    for field, value in values.items():
        if not isinstance(value, Integral):
            raise UserError(f"{field} must be a whole number, got {value!r}")


def check_ids(token_ids: Tensor) -> None:
    """Refuse ids that cannot be looked up in a table.

    Raises:
        ValueError: With their dtype.
    """
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise UserError(f"token_ids must be int64, got {token_ids.dtype}; set token_ids.long()")


def check_deviation(field: str, value: float) -> None:
    """Refuse what is no standard deviation.

    Raises:
        ValueError: Naming the field.
    """
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{field} must be a finite number of at least 0, got {value!r}")


def check_kind(field: str, value: object, kind: type, example: str) -> None:
    """Refuse an option that is given but is not the object that it takes.

    Args:
        field: The option's name.
        value: What was given; None is no option.
        kind: What it must be an instance of.
        example: What to write.

    Raises:
        ValueError: Naming the field, with the example.
    """
    if value is not None and not isinstance(value, kind):
        raise UserError(
            f"{field} must be a {kind.__name__} or None, got {value!r}; set {field}={example}"
        )


def check_option(field: str, value: object, options: Iterable[str]) -> None:
    """Refuse a value that is none of a field's options.

    Raises:
        ValueError: Naming the field and the options, with the nearest match.
    """
    options = tuple(options)
    if value not in options:
        raise UserError(
            f"{field} must be one of {', '.join(options)}, got {value!r}"
            + nearest(str(value), options)
        )


def from_table(field: str, table: Mapping[str, Any], kind: type[T], base: T | None = None) -> T:
    """An option's object by a table of its fields.

    Args:
        field: The option's name, for errors.
        table: Values by field.
        kind: The object's dataclass.
        base: What the fields that are left out are taken from; None takes their defaults.

    Raises:
        ValueError: For a field that there is not, with the nearest match, or one that is missing.
    """
    fields = {entry.name: entry.default for entry in dataclasses.fields(kind)}
    for name in table:
        if name not in fields:
            raise UserError(
                f"{field}.{name} is unknown{nearest(name, fields)} "
                f"(its entries are {', '.join(fields)})"
            )
    if base is not None:
        return dataclasses.replace(base, **table)
    for name, default in fields.items():
        if default is dataclasses.MISSING and name not in table:
            raise UserError(f"{field} has no {name}, which has no default; set it too")
    return kind(**table)
