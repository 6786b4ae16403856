import errno
import json
import os
from pathlib import Path

import pytest

from expertmesh.data.cache import building, cache_root, discard, made_once, verified
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


def read(folder: Path) -> str:
    verified(folder, "it is made anew")
    return (folder / "deep" / "a.txt").read_text()


def test_made_once_makes_what_is_absent_or_damaged(tmp_path):
    said: list[str] = []
    made: list[Path] = []

    def once() -> str:
        folder = tmp_path / "x"
        return made_once(folder, read, lambda: made.append(make(folder)), said.append)

    assert [once(), once()] == ["words", "words"]
    assert (len(made), said) == (1, [])
    (tmp_path / "x" / "deep" / "a.txt").write_text("wordz")
    assert once() == "words"
    assert len(made) == 2
    assert "a.txt is corrupt" in said[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_what_another_process_made_anew_is_kept(tmp_path):
    """Both find the damage; the other one is first to mend it, at the worst of times."""
    folder = make(tmp_path / "x")
    (folder / "deep" / "a.txt").write_text("wordz")
    looks: list[int] = []

    def look(path: Path) -> str:
        looks.append(len(looks))
        if len(looks) == 1:
            # Between finding the damage and removing the folder.
            with pytest.raises(UserError):
                read(path)
            discard(path)
            make(path, "by the other")
            raise UserError("damaged")
        return read(path)

    said: list[str] = []
    assert made_once(folder, look, lambda: None, said.append) == "by the other"
    assert said == []


def test_a_folder_that_vanishes_while_it_is_read_is_made_again(tmp_path):
    folder = make(tmp_path / "x")
    looks: list[int] = []

    def look(path: Path) -> str:
        looks.append(len(looks))
        if len(looks) == 1:
            discard(path)
        return (path / "deep" / "a.txt").read_text()

    def again() -> None:
        make(folder)

    assert made_once(folder, look, again, print) == "words"


def test_two_that_discard_at_once(tmp_path, monkeypatch):
    folder = make(tmp_path / "x")
    rename = Path.rename

    def beaten(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        discard(folder)
        return path.rename(target)

    monkeypatch.setattr(Path, "rename", beaten)
    discard(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_is_damaged_again_and_again_is_an_error(tmp_path):
    folder = tmp_path / "x"

    def make_badly() -> None:
        (make(folder) / "deep" / "a.txt").write_text("wordz")

    with pytest.raises(UserError, match=r"a\.txt is corrupt"):
        made_once(folder, read, make_badly, lambda _: None)
