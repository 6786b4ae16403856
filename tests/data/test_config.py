import pytest

from expertmesh.data import DataConfig
from expertmesh.errors import UserError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "a", "mix": {"b": 1.0}}, "set either source .* or mix"),
        ({"mix": {"a": 1.0, "b": -1}}, r"data.mix\['b'\] must be a positive number, got -1"),
        ({"mix": {"a": 0.0}}, r"data.mix\['a'\] must be a positive number, got 0.0"),
        ({"source": "a", "seq_len": 0}, "data.seq_len must be at least 1, got 0"),
        ({"kind": "instructions", "objective": "ul2"}, "data.objective is of data.kind = 'text'"),
        ({"template": "openmoe"}, "data.template is of data.kind = 'instructions'"),
        ({"train_on_prompt": True}, "data.train_on_prompt is of data.kind = 'instructions'"),
        ({"kind": "instructions", "template": "chat"}, "data.template must be one of 'plain'"),
        ({"kind": "instructions", "pack": True}, "data.pack must be false"),
        ({"objective": "ul2", "pack": False}, "cuts across documents, got pack=False"),
        ({"source": "a", "val_fraction": 1.0}, "data.val_fraction must be at least 0 and below 1"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_text_is_packed_and_conversations_are_not():
    assert DataConfig().packs
    assert not DataConfig(pack=False).packs
    assert not DataConfig(kind="instructions").packs
    assert not DataConfig(kind="instructions", pack=False).packs
