import numpy as np
import pytest

from expertmesh.data.text import read_corpus
from expertmesh.data.tokenizer import ByteTokenizer
from expertmesh.data.tokens import tokenize
from expertmesh.errors import UserError

BYTES = ByteTokenizer()


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "text" / "b.txt").write_text("three\nfour\n")
    return lambda: read_corpus(str(tmp_path / "text"))


def test_documents_end_to_end(corpus):
    split = tokenize(corpus(), BYTES, val_fraction=0.0)
    assert split.train.tokens.tolist() == [*b"one\ntwo\n", 256, *b"three\nfour\n", 256]
    assert split.train.offsets.tolist() == [0, 9, 21]
    assert len(split.val.tokens) == 0
    assert split.val.num_documents == 0


def test_both_parts_and_the_counts(corpus):
    split = tokenize(corpus(), BYTES, val_fraction=0.5)
    assert BYTES.decode(split.train.tokens) == "one\nthree\n"
    assert BYTES.decode(split.val.tokens) == "two\nfour\n"
    assert split.facts == {
        "split": "tails",
        "train_documents": 2,
        "val_documents": 2,
        "train_tokens": 12,
        "val_tokens": 11,
    }


def test_the_second_time_is_mapped_from_the_cache(corpus, monkeypatch):
    first = tokenize(corpus(), BYTES, val_fraction=0.5)
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: pytest.fail("encoded again"))
    second = tokenize(corpus(), BYTES, val_fraction=0.5)
    assert isinstance(second.train.tokens, np.memmap)
    assert np.array_equal(first.train.tokens, second.train.tokens)


def test_a_changed_file_or_option_is_another_key(corpus, tmp_path, cache):
    tokenize(corpus(), BYTES, val_fraction=0.5)
    tokenize(corpus(), BYTES, val_fraction=0.25)
    (tmp_path / "text" / "a.txt").write_text("ONE\ntwo\n")
    changed = tokenize(corpus(), BYTES, val_fraction=0.5)
    assert BYTES.decode(changed.train.tokens).startswith("ONE")
    assert len(list((cache / "tokens").iterdir())) == 3


def test_a_damaged_copy_is_made_anew_and_it_is_said(corpus, cache):
    said = []
    tokenize(corpus(), BYTES, val_fraction=0.5)
    next(cache.glob("tokens/*/train.bin")).write_bytes(b"\0" * 32)
    again = tokenize(corpus(), BYTES, val_fraction=0.5, say=said.append)
    assert BYTES.decode(again.train.tokens) == "one\nthree\n"
    assert "train.bin is corrupt" in said[0]


def test_a_large_vocabulary_takes_four_bytes(corpus, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 70_000)
    monkeypatch.setattr(ByteTokenizer, "eos_id", 66_000)
    split = tokenize(corpus(), ByteTokenizer(), val_fraction=0.0)
    assert split.train.tokens.dtype == np.uint32
    assert split.train.tokens[-1] == 66_000


def test_an_empty_file_holds_no_text(tmp_path, cache):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match=r"a\.txt' holds no text"):
        tokenize(read_corpus(str(tmp_path / "a.txt")), BYTES, val_fraction=0.1)
    assert list((cache / "tokens").iterdir()) == []


def test_a_fraction_that_leaves_nothing_to_train_on(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(100)))
    with pytest.raises(UserError, match=r"val_fraction=0.995 holds out all 100 documents"):
        tokenize(read_corpus(str(tmp_path / "a.jsonl")), BYTES, val_fraction=0.995)
