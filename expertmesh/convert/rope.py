"""The base of the rotary wavelengths, wherever a ``config.json`` says it."""

from collections.abc import Mapping
from typing import Any

from expertmesh.errors import UserError

# The tables of transformers 5 and of those before, whose ``{"type": "default"}`` says nothing.
_TABLES = ("rope_parameters", "rope_scaling")


def rope_theta(keys: Mapping[str, Any], usual: float) -> float:
    """Read the base from the key of its own or from a table.

    Args:
        keys: Of a ``config.json``.
        usual: What the family has where no key says it.

    Raises:
        UserError: If wavelengths are scaled, or two places disagree. transformers 5 follows its
            table then and those before the key, so one of two readers would be wrong.
    """
    said = {"rope_theta": keys.get("rope_theta")}
    for name in _TABLES:
        table = keys.get(name) or {}
        if not isinstance(table, Mapping):
            raise UserError(f"{name} must be a table or null, got {table!r}")
        # Older files call it ``type``.
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default":
            raise UserError(
                f"{name} with rope_type = {kind!r} is not supported (expected 'default')"
            )
        said[f"{name}.rope_theta"] = table.get("rope_theta")
    thetas = {name: float(value) for name, value in said.items() if value is not None}
    if len(set(thetas.values())) > 1:
        places = " and ".join(f"{name} = {value}" for name, value in thetas.items())
        raise UserError(f"{places} disagree; set them to one value, or leave one key out")
    return next(iter(thetas.values()), usual)
