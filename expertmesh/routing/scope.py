"""The set of tokens over which capacity is given out or a statistic is taken."""

from typing import Literal

from expertmesh.errors import UserError

Scope = Literal["micro_batch", "sequence"] | int | str
"""``"micro_batch"`` (the global one), ``"sequence"``, or a number of consecutive tokens.

A number is exact. ``"<=4096"`` takes the fewest groups of equal size that have at most so many
tokens: any number of tokens can be routed. flaxformer groups so too, and wants the number of groups
to be a multiple of the experts besides, which batches as large as those of training are.
"""


def check_scope(field: str, scope: Scope) -> None:
    """Refuse what is not a scope.

    Raises:
        ValueError: Naming the field and what it takes.
    """
    named = scope in ("micro_batch", "sequence")
    sized = isinstance(scope, int) and not isinstance(scope, bool) and scope > 0
    if not (named or sized or _bound(scope)):
        raise UserError(
            f"{field} must be 'micro_batch', 'sequence', a positive number of tokens, or at most "
            f"so many as '<=4096', got {scope!r}"
        )


def scope_size(scope: Scope, num_tokens: int, sequence_length: int | None) -> int:
    """Tokens in one group; groups are consecutive and of equal size.

    Args:
        scope: The scope.
        num_tokens: T.
        sequence_length: Tokens in a sequence, or None where the input has no sequences.

    Returns:
        The group's size, at least 1.

    Raises:
        ValueError: If T is no multiple of it, or sequences are asked for and there are none.
    """
    if scope == "micro_batch":
        return max(num_tokens, 1)
    if scope == "sequence":
        if sequence_length is None:
            raise UserError(
                "scope='sequence' needs the length of a sequence: give the layer an input of "
                "shape (batch, sequence, width), or the router sequence_length"
            )
        size = max(sequence_length, 1)
    elif isinstance(scope, str):
        return _largest_divisor(num_tokens, _bound(scope))
    else:
        size = scope
    if num_tokens % size:
        raise UserError(
            f"scope={scope!r} needs a number of tokens divisible by {size}, got {num_tokens}"
        )
    return size


def _bound(scope: Scope) -> int:
    """The number in ``"<=4096"``; 0 for anything else."""
    number = scope.removeprefix("<=") if isinstance(scope, str) and scope.startswith("<=") else ""
    return int(number) if number.isascii() and number.isdigit() else 0


def _largest_divisor(num_tokens: int, bound: int) -> int:
    groups = max(1, -(-num_tokens // bound))
    while num_tokens % groups:
        groups += 1
    return max(num_tokens // groups, 1)
