"""A ``config.json`` with anything in it gives a model or one sentence, never another error."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertmesh.convert.families import FAMILIES
from expertmesh.convert.published import config_from, read_keys
from expertmesh.errors import UserError
from expertmesh.models import decoder_preset

ANYTHING: tuple[Any, ...] = ("x", "", [], [1, "x"], {}, {"x": 1}, None, True, -1, 0, 1.5, 1e30, "3")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_one_value_of_another_kind(family: Any) -> None:
    keys = family.published_config(decoder_preset(family.presets[0]))
    said = []
    for key in (*keys, "rope_parameters", "router_options", "quantization_config"):
        for value in ANYTHING:
            try:
                config_from(family, Path("config.json"), keys | {key: value})
            except UserError as error:
                said.append(str(error))
    assert len(said) > 50
    assert all(text.startswith("config.json: ") and "\n" not in text for text in said)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_a_file_of_anything(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is no"):
        read_keys(tmp_path)


def test_the_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    assert read_keys(tmp_path)[1] == {"model_type": "x"}
