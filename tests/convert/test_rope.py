"""The base of the rotary wavelengths, from whichever key has it."""

from typing import Any

import pytest

from expertmesh.convert.rope import rope_theta
from expertmesh.errors import UserError


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({}, 7.0),
        ({"rope_theta": None, "rope_parameters": None, "rope_scaling": None}, 7.0),
        ({"rope_theta": 500}, 500.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, 500.0),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_theta": 500}}, 500.0),
        ({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}, 500.0),
        ({"rope_scaling": {"rope_type": "default"}}, 7.0),
    ],
)
def test_where_it_is_said(keys: dict[str, Any], theta: float) -> None:
    assert rope_theta(keys, 7.0) == theta


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"rope_theta": 3e5, "rope_parameters": {"rope_theta": 1e4}},
            r"rope_theta = 300000.0 and rope_parameters.rope_theta = 10000.0 disagree",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_parameters with rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling with rope_type = 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, r"rope_scaling with rope_type = 'llama3'"),
        ({"rope_scaling": "linear"}, r"rope_scaling must be a table or null, got 'linear'"),
    ],
)
def test_what_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rope_theta(keys, 7.0)
