"""Writes the few TOML forms that a run file needs; Python's ``tomllib`` only reads."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """TOML text of named tables of plain values.

    Args:
        sections: Table name to keys and values: str, bool, int, float, sequences and mappings of
            these. A None is left out, since TOML has no null: read back, it is the default.
    """
    blocks = []
    for name, values in sections.items():
        lines = [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]
        blocks.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML wants escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = [(str(key), item) for key, item in value.items() if item is not None]
        items = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in pairs)
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, Sequence):
        return f"[{', '.join(_value(item) for item in value)}]"
    raise TypeError(f"a {type(value).__name__} has no TOML form: {value!r}")
