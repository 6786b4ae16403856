import json
from dataclasses import replace

import pytest
import torch

from expertmesh.data import DataConfig, Loader, build_data, in_order
from expertmesh.data.dataset import IGNORE
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


def test_a_small_weight_does_not_need_a_place_in_the_evaluation(text):
    mix = {text[0]: 0.99, text[1]: 0.01}
    data = build_data(DataConfig(mix=mix, seq_len=16, val_fraction=0.1))
    tokens = torch.cat([batch.tokens_BS for batch in in_order(data.val, 4)])
    assert [int((tokens == ord(letter)).any(1).sum()) for letter in "ab"] == [10, 10]


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


def test_no_source_is_an_error_of_the_run_not_of_the_default():
    with pytest.raises(UserError, match=r"data\.source is not set"):
        build_data(DataConfig())


@pytest.fixture
def instructions(tmp_path):
    """40 records; the answer of record n has n letters."""
    path = tmp_path / "q.jsonl"
    records = [{"instruction": f"question {n}", "output": "x" * n} for n in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_instructions(instructions):
    said = []
    config = DataConfig(
        kind="instructions", source=instructions, seq_len=32, val_fraction=0.1, template="openmoe"
    )
    with pytest.raises(UserError, match=r"has an answer within data\.seq_len=32; set a higher"):
        build_data(config, say=said.append)
    config = replace(config, template="plain")
    data = build_data(config, say=said.append)
    (record,) = json.loads(json.dumps(data.provenance))["sources"]
    assert (record["records"], record["unanswered"], record["without_answer"]) == (40, 1, 0)
    assert record["train_samples"] == len(data.train) == 35
    assert record["val_samples"] == len(data.val) == 4
    assert record["truncated"] > 10
    assert f"{record['truncated']} of 40 conversations are longer than data.seq_len=32" in said[-1]
    batch = Loader(data.train, batch_size=35, seed=0).batch(0)
    assert batch.num_targets == record["train_targets"]
    assert not batch.padding_mask_BS.all(1).any()
    rows = zip(batch.tokens_BS, batch.targets_BS, strict=True)
    for tokens_S, targets_S in rows:
        prompt = data.tokenizer.decode(tokens_S[targets_S == IGNORE].tolist())
        assert prompt.startswith("question ")
        assert set(targets_S[targets_S != IGNORE].tolist()) <= {*b"x\n", 256}
    questions = {data.tokenizer.decode(s.tokens_S.tolist()).split("\n")[0] for s in data.train}
    assert not questions & {
        data.tokenizer.decode(s.tokens_S.tolist()).split("\n")[0] for s in data.val
    }


def test_instructions_come_from_the_cache(instructions, cache):
    config = DataConfig(kind="instructions", source=instructions, val_fraction=0)
    first = build_data(config)
    assert first.val is None
    folders = sorted(cache.glob("tokens/*"))
    again = build_data(replace(config, seq_len=64, train_on_prompt=True))
    assert sorted(cache.glob("tokens/*")) == folders
    assert len(again.train) == len(first.train)
    build_data(replace(config, template="openmoe"))
    assert len(list(cache.glob("tokens/*"))) == 2
    said = []
    next(folders[0].glob("train_learned.bin")).write_bytes(b"")
    assert len(build_data(config, say=said.append).train) == len(first.train)
    assert "corrupt" in said[0]


def test_a_mixture_of_instructions(instructions, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    mix = {instructions: 3.0, str(other): 1.0}
    data = build_data(DataConfig(kind="instructions", mix=mix, val_fraction=0, seq_len=64))
    batch = Loader(data.train, batch_size=len(data.train), seed=0).batch(0)
    assert int((batch.tokens_BS[:, 0] == ord("a")).sum()) == len(data.train) // 4


def test_the_ul2_objective(text):
    config = DataConfig(
        mix={text[0]: 1.0, text[1]: 1.0},
        tokenizer="byte-ul2",
        objective="ul2-openmoe",
        seq_len=64,
        val_fraction=0.1,
    )
    data = build_data(config)
    assert data.provenance["objective"] == "ul2-openmoe"
    batch = Loader(data.train, batch_size=16, seed=0).batch(0)
    assert 0 < batch.num_targets < 16 * 64
    assert len(data.val) >= 2
    with pytest.raises(UserError, match=r"the val part has .* a sample needs"):
        build_data(replace(config, val_fraction=0.02))


@pytest.mark.parametrize("pack", [True, False])
def test_rows_begin_with_the_first_token_of_a_tokenizer_that_has_one(text, t5_model, pack):
    config = DataConfig(source=text[0], tokenizer=str(t5_model), seq_len=8, pack=pack)
    data = build_data(config)
    assert data.tokenizer.bos_id == 0
    for batch in in_order(data.train, 4):
        assert (batch.tokens_BS[:, 0] == 0).all()


def test_nothing_optional_is_imported_early():
    import subprocess
    import sys

    code = (
        "import sys, expertmesh.data, expertmesh.cli.data\n"
        "heavy = ('rich', 'tokenizers', 'zstandard', 'sentencepiece', 'pyarrow', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("source", ["a.txt", "folder", "shakespeare", "hf:name:train:text"])
def test_fields_that_nothing_is_read_by_are_refused(source, text, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.md").write_text("text")
    given = str(tmp_path / source) if (tmp_path / source).exists() else source
    with pytest.raises(UserError, match=rf"data\.fields is for .*got \['body'\] for '.*{source}'"):
        build_data(DataConfig(source=given, fields=("body",)))


def test_fields_of_a_mixture_are_of_those_that_have_records(text, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"body": "some text"}\n' * 9)
    mix = {text[0]: 1.0, str(tmp_path / "b.jsonl"): 1.0}
    assert len(build_data(DataConfig(mix=mix, fields=("body",), seq_len=8, val_fraction=0)).train)
