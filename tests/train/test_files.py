from pathlib import Path

import pytest

from expertmesh.train.files import write_whole


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "new" / "a.json", "1")
    assert write_whole(path, "2").read_text() == "2"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole(tmp_path / "a.json", "old")

    def full(self: Path, text: str, **options: str) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"


def test_a_full_disk_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_whole(tmp_path / "file", "old")
    (tmp_path / ".file.unfinished").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device; make room") as caught:
        write_whole(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
