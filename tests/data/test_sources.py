import os
import sys

import pytest

from expertmesh.data.sources import NpmPackage, Sdist, Unreachable


def nothing(done: int, total: int) -> None:
    pass


def sdist(path, sha256: str = "0" * 64) -> Sdist:
    return Sdist(package="tales", version="1.0", sha256=sha256, size=1, keep=("*",))


NPM = NpmPackage(package="@tales/all", version="1.0.0", sha256="0" * 64, size=1, keep=("*",))


def fake(folder, name: str, script: str):
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def test_an_sdist_is_stored_as_it_is_and_never_run(index, tmp_path):
    """`pip download` would run this setup.py for the package's metadata."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='tales')\n"
    path = index.tar("tales-1.0.tar.gz", {"tales-1.0/setup.py": code, "tales-1.0/a.txt": "a"})
    (tmp_path / "out").mkdir()
    got = sdist(path).download(tmp_path / "out", nothing)
    assert got.read_bytes() == path.read_bytes()
    assert not ran.exists()


def test_progress_is_told(index, tmp_path):
    path = index.tar("tales-1.0.tar.gz", {"tales-1.0/a.txt": "a"})
    told = []
    (tmp_path / "out").mkdir()
    sdist(path).download(tmp_path / "out", lambda done, total: told.append(done))
    assert told[-1] == path.stat().st_size


def test_another_version_is_not_taken(index, tmp_path):
    index.tar("tales-2.0.tar.gz", {"tales-2.0/a.txt": "a"})
    with pytest.raises(Unreachable, match=r"tales==1\.0 was not found"):
        sdist(None).download(tmp_path, nothing)


def test_of_two_indexes_the_one_with_the_pinned_hash(index, tmp_path, hash_of, monkeypatch):
    wrong = index.tar("tales-1.0.tar.gz", {"tales-1.0/a.txt": "wrong"})
    (tmp_path / "other").mkdir()
    right = wrong.rename(tmp_path / "other" / "tales-1.0.tar.gz")
    wrong = index.tar("tales-1.0.tar.gz", {"tales-1.0/a.txt": "another"})
    pages = []
    for name, path in (("first", wrong), ("second", right)):
        page = tmp_path / name / "tales" / "index.html"
        page.parent.mkdir(parents=True)
        page.write_text(f"<a href='{path.as_uri()}#sha256={hash_of(path)}'>{path.name}</a>")
        pages.append((tmp_path / name).as_uri())
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", pages[0])
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", pages[1])
    (tmp_path / "out").mkdir()
    got = sdist(right, hash_of(right)).download(tmp_path / "out", nothing)
    assert hash_of(got) == hash_of(right)


def test_python_without_pip(index, tmp_path, monkeypatch):
    python = fake(
        tmp_path, "python", "echo \"ModuleNotFoundError: No module named 'pip'\" >&2\nexit 1"
    )
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Unreachable, match="python -m ensurepip"):
        sdist(None).download(tmp_path, nothing)


def test_npm_is_asked_to_run_no_script(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    fake(tmp_path, "npm", 'echo "$@" > asked\necho x > tales-all-1.0.0.tgz\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    got = NPM.download(tmp_path / "out", nothing)
    assert got == tmp_path / "out" / "tales-all-1.0.0.tgz"
    asked = (tmp_path / "out" / "asked").read_text()
    assert asked.startswith("pack @tales/all@1.0.0 --ignore-scripts")


def test_npm_that_fails_says_why(tmp_path, monkeypatch):
    fake(
        tmp_path,
        "npm",
        "echo npm error code E1 >&2\necho npm error no network >&2\necho advice >&2\nexit 1\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Unreachable, match="no network"):
        NPM.download(tmp_path, nothing)


def test_no_npm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unreachable, match="npm client is not installed"):
        NPM.download(tmp_path, nothing)
