import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

STAMP = {
    "command": "python benchmarks/old.py",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef+changes",
    "hardware": {"cpu": "a processor", "threads": 3, "gpus": []},
    "versions": {"torch": "2.11.0"},
}


@pytest.fixture
def record(script):
    return script("record")


def test_what_is_saved_is_loaded(record, tmp_path):
    assert record.load_if_there("x", tmp_path) == {}
    path = record.save("x", {"figure": 1.5}, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    found = record.load("x", tmp_path)
    assert found["figure"] == 1.5
    assert "earlier" not in found
    assert found["versions"]["torch"] == metadata.version("torch")


def test_peers_that_are_installed_are_in_the_versions(record, monkeypatch):
    def version(package):
        if package == "triton":
            raise metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(record.metadata, "version", version)
    found = record.versions()
    peers = {"sonic-moe", "quack-kernels", "scattermoe", "liger-kernel", "accelerate"}
    assert peers | {"transformers", "torch"} <= found.keys()
    assert "triton" not in found


def test_kept_parts_keep_the_stamp_of_their_own_run(record, tmp_path):
    old = STAMP | {"earlier": [STAMP | {"command": "python older.py", "of": ["a", "b"]}]}
    kept = record.stamps_of(old, ["b", "c"])
    assert [(s["command"], s["of"]) for s in kept] == [
        ("python older.py", ["b"]),
        ("python benchmarks/old.py", ["c"]),
    ]
    record.save("x", {}, tmp_path, kept=kept)
    found = record.load("x", tmp_path)
    assert record.stamps_of(found, ["b", "d"])[0] == kept[0]
    text = record.made_by(found)
    assert text.count("From an earlier run") == 2
    assert "`python older.py`, commit 0123456789+changes, a processor, 3 threads" in text
    assert text.endswith("2026-01-02: c\n")
    assert record.stamps_of(old, []) == []


def test_many_parts_are_counted_by_name(record):
    parts = [f"{name}: seed {seed}" for name in ("one", "two") for seed in range(8)]
    text = record.made_by(STAMP | {"earlier": [STAMP | {"of": parts}]}, "gloo")
    assert "torch 2.11.0, gloo, 2026-01-02: one (8), two (8)\n" in text


def test_changes_of_what_measures_are_told_and_of_results_not(record, tmp_path, monkeypatch):
    monkeypatch.delenv("EXPERTMESH_COMMIT", raising=False)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "benchmarks" / "results")

    def git(*words):
        who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in
               ("NAME", "EMAIL")}  # fmt: skip
        subprocess.run(["git", *words], cwd=tmp_path, env=os.environ | who, check=True)

    for name in ("expertmesh", "benchmarks/results", "tests/distributed", "docs"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "file").write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = record._commit()
    assert len(commit) == 40
    for name, told in (
        ("docs", ""),
        ("benchmarks/results", ""),
        ("tests/distributed", "+changes"),
        ("benchmarks", "+changes"),
        ("expertmesh", "+changes"),
    ):
        changed = Path(tmp_path, name, "another")
        changed.write_text("after")
        assert record._commit() == commit + told, name
        changed.unlink()
