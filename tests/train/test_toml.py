import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.train import toml

_scalars = (
    st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner) | st.dictionaries(_names, inner), max_leaves=8
)


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), _values))
def test_what_is_written_is_read_back(values: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps({"table": values})) == {"table": values}


def test_none_is_left_out() -> None:
    assert toml.dumps({"a": {"x": None, "y": 1}}) == "[a]\ny = 1\n"


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="set has no TOML form"):
        toml.dumps({"a": {"x": {1}}})
