"""Differences by name."""

import pytest

from expertmesh.convert.check import check_tensors, named, unlike
from expertmesh.convert.openmoe.names import layout
from expertmesh.errors import UserError
from tests.convert.openmoe import by_hand


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["head"], "head"),
        (["a.0.b", "a.1.b", "a.2.b", "a.5.b"], "a.{0-2,5}.b"),
        (["a.10.b", "a.9.b"], "a.{9-10}.b"),
        (["a.3.b", "a.3.c"], "a.3.b, a.3.c"),
        (["x/layers_0/k/wi_0/kernel", "x/layers_1/k/wi_0/kernel"], "x/layers_{0-1}/k/wi_0/kernel"),
        (
            [f"l.{i}.experts.{e}.w" for i in (1, 3) for e in range(4)],
            "l.{1,3}.experts.{0-3}.w",
        ),
        (
            ["l.0.experts.0.w", "l.0.experts.1.w", "l.1.experts.0.w"],
            "l.0.experts.{0-1}.w, l.1.experts.0.w",
        ),
    ],
)
def test_names_that_differ_in_numbers_are_joined(names: list[str], text: str) -> None:
    assert named(names) == text


def test_every_difference_is_named() -> None:
    files = layout(by_hand.CONFIG)
    shapes = dict(files.their_shapes)
    for i in (0, 1, 3):
        del shapes[f"model.layers.{i}.input_layernorm.weight"]
    shapes["model.layers.0.mlp.gate_proj.bias"] = (3,)
    shapes["lm_head.weight"] = (41, 64)
    with pytest.raises(UserError) as caught:
        check_tensors(files, shapes, "folder")
    assert str(caught.value) == (
        "folder does not fit the model; "
        "missing: model.layers.{0-1,3}.input_layernorm.weight; "
        "unexpected: model.layers.0.mlp.gate_proj.bias; "
        "misshapen: lm_head.weight (expected [40, 64], got [41, 64])"
    )


def test_what_fits_passes() -> None:
    files = layout(by_hand.CONFIG)
    check_tensors(files, files.their_shapes, "folder")


def test_what_is_unlike_is_named_and_what_is_not_there_is_passed_over() -> None:
    found = {"a": 1, "b": "x", "c": None}
    assert unlike(found, {"a": 1, "d": 2}) == ""
    assert (
        unlike(found, {"b": "y", "a": 1, "c": 3}) == "b = 'x' (expected 'y'), c = None (expected 3)"
    )
