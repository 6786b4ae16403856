from pathlib import Path
from typing import Any

import pytest

from expertmesh.errors import UserError
from expertmesh.train.provenance import check_held_out, check_same_data, save_provenance


def provenance(*hashes: str, tokenizer: str = "byte", origin: str = "PyPI a 1") -> dict[str, Any]:
    records = [
        {"source": f"set{i}", "sha256": sha256 * 64, "from": origin, "weight": 1.0}
        for i, sha256 in enumerate(hashes)
    ]
    return {"tokenizer": tokenizer, "tokenizer_identity": tokenizer, "sources": records}


def test_the_first_start_has_nothing_to_compare(tmp_path: Path) -> None:
    check_same_data(tmp_path, provenance("a"))


def test_content_decides_and_not_names_order_or_weights(tmp_path: Path) -> None:
    save_provenance(tmp_path, provenance("a", "b"))
    other = provenance("b", "a", origin="npm a 1")
    other["sources"][0]["weight"] = 2.0
    check_same_data(tmp_path, other)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (provenance("c", origin="npm b 2"), r"from npm b 2 with SHA-256 cccccccccccccccc\.\.\."),
        (provenance("a", "b"), "'set0' from .* and 'set1' from "),
        (provenance("a", tokenizer="t.json"), "in tokens of 't.json'"),
    ],
)
def test_other_data_is_named(tmp_path: Path, now: dict[str, Any], words: str) -> None:
    save_provenance(tmp_path, provenance("a"))
    message = f"begun with other data: 'set0' from PyPI a 1 .*; now it is .*{words}.*set run.dir"
    with pytest.raises(UserError, match=message):
        check_same_data(tmp_path, now)


@pytest.mark.parametrize("text", ["", "[]", '{"sources": [{}]}', "{"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json is not readable.*delete it"):
        check_same_data(tmp_path, provenance("a"))


def test_what_was_trained_on_does_not_become_held_out(tmp_path: Path) -> None:
    save_provenance(tmp_path, provenance("a") | {"val_fraction": 0.1})
    now = provenance("a") | {"val_fraction": 0.2}
    with pytest.raises(UserError, match=r"val_fraction must stay 0\.1, got 0\.2"):
        check_same_data(tmp_path, now)
    with pytest.raises(UserError, match=r"val_fraction must be at most 0\.1, got 0\.2"):
        check_held_out(tmp_path, now, chosen=True)
    check_held_out(tmp_path, now | {"val_fraction": 0.05}, chosen=False)


def test_other_data_is_evaluated_where_it_is_named(tmp_path: Path) -> None:
    save_provenance(tmp_path, provenance("a") | {"val_fraction": 0.1})
    other = provenance("b") | {"val_fraction": 0.5}
    with pytest.raises(UserError, match=r"other data: .*or name what to evaluate on"):
        check_held_out(tmp_path, other, chosen=False)
    check_held_out(tmp_path, other, chosen=True)
