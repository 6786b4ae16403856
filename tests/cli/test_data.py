import json
import re
import zipfile

import pytest

from expertmesh.cli.data import main
from expertmesh.data import catalog
from expertmesh.data.cache import file_sha256
from expertmesh.data.catalog import CATALOG, Entry
from expertmesh.data.sources import Wheel
from expertmesh.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tales(tmp_path, monkeypatch):
    """A catalog name that a folder of this machine serves."""
    path = tmp_path / "tales-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("t/a.txt", "one fine day")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    source = Wheel(
        package="tales", version="1.0", sha256=file_sha256(path), size=99, keep=("*.txt",)
    )
    entry = Entry(name="tales", kind="text", summary="made up", licence="CC0", sources=(source,))
    monkeypatch.setitem(catalog.CATALOG, "tales", entry)
    return path


def test_bare_prints_help(capsys):
    assert main([]) == 0
    assert "usage: expertmesh data" in capsys.readouterr().out


def test_list_shows_each_entry_with_licence_and_source(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for entry in CATALOG.values():
        assert entry.name in out
        assert entry.licence in out
        assert entry.sources[0].where in out
    assert ", cached" not in out


def test_fetch_then_list_then_show(tales, capsys):
    assert main(["fetch", "tales"]) == 0
    captured = capsys.readouterr()
    assert "fetching tales from PyPI tales 1.0 (wheel)" in captured.err
    assert "tales: 1 files of PyPI tales 1.0 (wheel)" in captured.out
    assert main(["list"]) == 0
    assert "0.0 MB, cached; CC0" in capsys.readouterr().out
    assert main(["show", "tales"]) == 0
    out = capsys.readouterr().out
    assert "documents: 1\ncharacters: 12\n" in out
    assert out.endswith("one fine day\n")


def test_show_a_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"q": "why", "a": "so"}\n')
    assert main(["show", str(tmp_path / "a.jsonl"), "--fields", "q", "a"]) == 0
    assert capsys.readouterr().out.endswith("why\nso\n")


def test_preview_a_file_and_a_run_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "why? ", "completion": "so"}\n' * 9)
    source = str(tmp_path / "a.jsonl")
    expected = (
        "sample 0 of 9: 7 tokens, 3 to learn, 1 padding\n  given | why? \n  learn | so<eos>\n\n"
    )
    given = ["--kind", "instructions", "--seq-len", "8", "--samples", "1"]
    (tmp_path / "run.toml").write_text(
        '[model]\npreset = "nano"\n[data]\nkind = "instructions"\nval_fraction = 0\n'
        f"source = {json.dumps(source)}\n"
    )
    assert main(["preview", str(tmp_path / "run.toml"), *given]) == 0
    assert re.sub(r"sample \d", "sample 0", capsys.readouterr().out) == expected
    with pytest.raises(UserError, match=r"has 1 question, too few .*data\.val_fraction = 0"):
        main(["preview", source, *given])
    with pytest.raises(UserError, match=r"data\.seq_len: expected an integer, got 'x'"):
        main(["preview", source, "--seq-len", "x"])


@pytest.mark.parametrize("samples", ["0", "-1"])
def test_preview_shows_a_sample_or_says_why_not(samples):
    with pytest.raises(UserError, match=f"--samples must be at least 1, got {samples}"):
        main(["preview", "nowhere", "--samples", samples])


@pytest.mark.parametrize("name", ["alpaca-demo", "tokenizer-umt5"])
def test_a_name_of_the_catalog_has_its_own_fields(name):
    with pytest.raises(UserError, match=f"got a b for {name}, which is read as the catalog says"):
        main(["show", name, "--fields", "a", "b"])


def test_a_misspelt_name_fetches_nothing(tales, tmp_path):
    with pytest.raises(UserError, match="did you mean 'tales'"):
        main(["fetch", "tales", "tale"])
    assert not (tmp_path / "cache").exists()


def test_a_wrong_command_is_status_2(capsys):
    with pytest.raises(SystemExit) as error:
        main(["fetsch"])
    assert error.value.code == 2
    assert "invalid choice" in capsys.readouterr().err
