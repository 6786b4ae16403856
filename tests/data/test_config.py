import json

import pytest

from expertmesh.data import DataConfig, Loader, build_data, in_order
from expertmesh.errors import UserError


@pytest.fixture
def text(tmp_path):
    """Two files of different letters, so that a token tells where it is from."""
    paths = []
    for letter in "ab":
        path = tmp_path / f"{letter}.txt"
        path.write_text(f"{letter * 15}\n" * 100)
        paths.append(str(path))
    return paths


def test_a_file_to_batches(text):
    data = build_data(DataConfig(source=text[0], seq_len=16, val_fraction=0.1))
    batch = Loader(data.train, batch_size=3, seed=0).batch(0)
    assert batch.tokens_BS.shape == (3, 16)
    assert data.tokenizer.decode(batch.tokens_BS[0].tolist()).strip("\n").strip("a") in ("", "\n")
    assert len(data.train) == 90
    assert len(data.val) == 10


def test_provenance_is_json_and_complete(text):
    data = build_data(DataConfig(source=text[0], seq_len=16))
    (record,) = json.loads(json.dumps(data.provenance))["sources"]
    assert record["source"] == text[0]
    assert record["bytes"] == 1600
    assert len(record["sha256"]) == 64
    assert record["train_tokens"] + record["val_tokens"] == 1600 + 2


def test_a_mixture(text):
    mix = {text[0]: 3.0, text[1]: 1.0}
    data = build_data(DataConfig(mix=mix, seq_len=16, val_fraction=0.1))
    batch = Loader(data.train, batch_size=len(data.train), seed=0).batch(0)
    from_b = (batch.tokens_BS == ord("b")).any(1).float().mean()
    assert abs(float(from_b) - 0.25) < 0.01
    assert sum(len(batch.tokens_BS) for batch in in_order(data.val, 4)) == len(data.val) == 20
    assert [record["weight"] for record in data.provenance["sources"]] == [3.0, 1.0]


def test_without_packing_a_document_has_its_rows(tmp_path):
    lines = [json.dumps({"text": "x" * length}) for length in range(1, 31)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = DataConfig(source=str(tmp_path / "a.jsonl"), seq_len=8, pack=False, val_fraction=0)
    data = build_data(config)
    batch = next(in_order(data.train, 100))
    assert len(batch.tokens_BS) == sum(-(-length // 8) for length in range(1, 31))
    assert batch.num_targets == sum(range(1, 31))
    assert data.val is None


def test_one_byte(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config = {"source": str(tmp_path / "a.txt"), "val_fraction": 0.0}
    with pytest.raises(UserError, match="train part has 2 tokens, a sample needs 257"):
        build_data(DataConfig(**config))
    (batch,) = in_order(build_data(DataConfig(**config, pack=False, seq_len=4)).train, 1)
    assert batch.tokens_BS.tolist() == [[ord("x"), 257, 257, 257]]
    assert batch.targets_BS.tolist() == [[256, -100, -100, -100]]


def test_a_held_out_part_that_is_too_short(text):
    with pytest.raises(UserError, match=r"the val part has 17 tokens, a sample needs 65"):
        build_data(DataConfig(source=text[0], seq_len=64, val_fraction=0.01))


def test_unicode_survives(tmp_path):
    words = "Größe 語 🙂 naïve\n"
    (tmp_path / "a.txt").write_text(words * 50, encoding="utf-8")
    data = build_data(DataConfig(source=str(tmp_path / "a.txt"), seq_len=len(words.encode())))
    assert data.tokenizer.decode(data.train[0].tokens_S.tolist()) == words


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "a", "mix": {"b": 1.0}}, "set either source .* or mix"),
        ({"source": "a", "seq_len": 0}, "data.seq_len must be at least 1, got 0"),
        ({"source": "a", "val_fraction": 1.0}, "data.val_fraction must be at least 0 and below 1"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**fields)


def test_no_source_is_an_error_of_the_run_not_of_the_default():
    with pytest.raises(UserError, match=r"data\.source is not set"):
        build_data(DataConfig())


def test_nothing_optional_is_imported_early():
    import subprocess
    import sys

    code = (
        "import sys, expertmesh.data, expertmesh.cli.data\n"
        "heavy = ('rich', 'tokenizers', 'sentencepiece', 'pyarrow', 'datasets', 'pip')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
