"""``expertmesh convert``: its words. What it does with them is in tests/convert."""

from pathlib import Path

import pytest

from expertmesh.cli.convert import FAMILIES, main
from expertmesh.convert import families
from expertmesh.convert.published import save_published
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM, decoder_preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    save_published(DecoderLM(decoder_preset("openmoe-test", vocab_size=20)), path / "SRC")
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SRC"], r"give the folder to write, or --verify"),
        (["SRC", "DST", "--to", "per-expart"], r"got 'per-expart'; did you mean 'per-expert'\?"),
        (["SRC", "DST", "--shard-gb", "0"], r"--shard-gb must be above 0 and finite, got 0"),
        (["SRC", "DST", "--shard-gb", "nan"], r"--shard-gb must be above 0 and finite, got nan"),
        (["SRC", "DST", "--shard-gb", "1e300"], r"--shard-gb must be above 0 and finite"),
        (["SRC", "--verify", "--config", "openmoe-8b"], r"writes nothing, got --config beside it"),
        (
            ["SRC", "SRC", "--verify", "--to", "t5x", "--dtype", "bf16", "--shard-gb", "1"],
            r"--verify writes nothing, got --to, --dtype, --shard-gb beside it; leave that out",
        ),
        (["nowhere", "DST"], r"nowhere has neither model.safetensors nor"),
        (["SRC/model.safetensors", "DST"], r"is a file; give the folder that it is in, SRC"),
        (["SRC", "DST", "--config", "nowhere.json"], r"nowhere.json is missing"),
        (["SRC", "DST", "--config", "openmoe-8b"], r"SRC does not fit the model; missing: "),
        (["SRC", "DST", "--tokenizer", "nowhere"], r"nowhere has no tokenizer"),
    ],
)
def test_wrong_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        main(["openmoe", *words])
    assert [path.name for path in folder.iterdir()] == ["SRC"]


def test_an_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["openmoo", "SRC", "DST"])
    assert "invalid choice: 'openmoo'" in capsys.readouterr().err


def test_help_names_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(families.FAMILIES) == FAMILIES
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "{openmoe,mixtral,olmoe,qwen3-moe}" in capsys.readouterr().out


def test_a_family_reads_its_own_folders_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"config.json is of openmoe, not of mixtral"):
        main(["mixtral", "SRC", "DST"])
