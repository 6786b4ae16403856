import errno
import json
import os
from pathlib import Path

import pytest

from expertmesh.data.cache import building, cache_root, discard, verified
from expertmesh.errors import UserError


def make(folder: Path, text: str = "words") -> Path:
    with building(folder, {"from": "here"}) as work:
        (work / "deep").mkdir()
        (work / "deep" / "a.txt").write_text(text)
    return folder


def test_cache_root_order_of_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "env"))
    assert cache_root() == tmp_path / "env"
    assert cache_root(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("EXPERTMESH_CACHE")
    assert cache_root() == Path.home() / ".cache" / "expertmesh"


def test_building_stores_facts_sizes_and_hashes(tmp_path):
    manifest = verified(make(tmp_path / "x"), "mend it")
    assert manifest["from"] == "here"
    assert manifest["files"]["deep/a.txt"]["size"] == 5


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with building(tmp_path / "root" / "x", {}) as work:
            (work / "half").write_text("h")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "root").iterdir()) == []


def test_the_name_appears_only_when_the_folder_is_whole(tmp_path):
    with building(tmp_path / "x", {}) as work:
        (work / "a").write_text("a")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "manifest.json").is_file()


def test_of_two_builders_the_first_wins(tmp_path):
    with building(tmp_path / "x", {}) as slow:
        (slow / "a").write_text("slow")
        with building(tmp_path / "x", {}) as fast:
            (fast / "a").write_text("fast")
    assert (tmp_path / "x" / "a").read_text() == "fast"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


@pytest.mark.parametrize("damage", ["other", "wordz", None])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = make(tmp_path / "x") / "deep" / "a.txt"
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage)
    with pytest.raises(UserError, match=r"a\.txt is (missing|corrupt).*mend it"):
        verified(tmp_path / "x", "mend it")


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"files": 3})])
def test_a_damaged_manifest_is_named(tmp_path, text):
    (make(tmp_path / "x") / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is missing or unreadable"):
        verified(tmp_path / "x", "mend it")


def test_discard(tmp_path):
    discard(make(tmp_path / "x"))
    discard(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_users_to_mend(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(UserError, match=r"No space left.*EXPERTMESH_CACHE"),
        building(tmp_path / "x", {}),
    ):
        raise full


def test_a_file_where_the_cache_should_be(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot write the cache"):
        make(tmp_path / "cache" / "x")
