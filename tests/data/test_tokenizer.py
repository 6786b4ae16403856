import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.data.tokenizer import ByteTokenizer, HFTokenizer, SentencePieceTokenizer
from expertmesh.data.tokenizer import load_tokenizer as load
from expertmesh.errors import UserError

TEXT = "The experts share the work.\nEach naïve token goes to a few; 語 🙂."


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.pad_id]) == text


def test_broken_bytes_decode_to_the_replacement_character():
    assert ByteTokenizer().decode([0x41, 0xC3, 0x42]) == "A\ufffdB"
    assert ByteTokenizer().decode([0xF0, 0x9F]) == "\ufffd"


def test_a_lone_surrogate_does_not_stop_a_run():
    assert ByteTokenizer().encode("a\ud800b").tolist() == list(b"a?b")


def test_byte_tokens_are_printable():
    texts = [ByteTokenizer().token_text(i) for i in range(258)]
    assert len(set(texts)) == 258
    assert all(text.isprintable() and text.strip() for text in texts)
    assert texts[ord("A")] == "A"
    assert texts[ord("\n")] == "\\n"
    assert texts[0xC3] == "<0xC3>"


@pytest.fixture
def bpe():
    """A small byte-level BPE, trained here."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<stop>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT] * 4, trainer)
    return inner


def test_tokenizer_json(bpe, tmp_path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load(str(spec))
        assert isinstance(tokenizer, HFTokenizer)
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.vocab_size == bpe.get_vocab_size()
        assert tokenizer.eos_id == tokenizer.pad_id == bpe.token_to_id("<|endoftext|>")
        many = tokenizer.encode_many([TEXT, ""])
        assert [ids.tolist() for ids in many] == [tokenizer.encode(TEXT).tolist(), []]
        texts = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
        assert all(text.isprintable() and text for text in texts)


def test_tokenizer_config_names_the_special_tokens(bpe, tmp_path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<stop>"}, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(str(tmp_path))
    assert tokenizer.eos_id == bpe.token_to_id("<stop>")
    assert tokenizer.pad_id == bpe.token_to_id("<|endoftext|>")


def test_gpt2s_two_files(bpe, tmp_path):
    model = json.loads(bpe.to_str())["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = load(str(tmp_path))
    assert tokenizer.encode(TEXT).tolist() == bpe.encode(TEXT).ids
    assert tokenizer.decode([*tokenizer.encode(TEXT), tokenizer.eos_id]) == TEXT


def test_a_vocabulary_without_an_end_of_document(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="no end-of-document token"):
        load(str(tmp_path / "t.json"))


def test_sentencepiece(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 8),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model.v1").write_bytes(model.getvalue())
    tokenizer = load(str(tmp_path / "tokenizer.model.v1"))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    text = "Each expert takes a few; ✓."
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos_id]) == text
    assert tokenizer.pad_id == tokenizer.eos_id == 2
    assert all(tokenizer.token_text(i).isprintable() for i in range(tokenizer.vocab_size))
    (tmp_path / "tokenizer.model.v1").rename(tmp_path / "spiece.model")
    assert load(str(tmp_path)).identity == tokenizer.identity


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " is not a"):
        load(str(tmp_path / name))


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="neither a file nor a folder; set it to 'byte'"):
        load("no/such.json")
    with pytest.raises(UserError, match="holds neither"):
        load(str(tmp_path))
    with pytest.raises(UserError, match="is a data set, not a tokenizer"):
        load("classics")


def test_a_file_that_asks_for_cutting_and_filling_is_not_obeyed(bpe, tmp_path):
    bpe.save(str(tmp_path / "plain.json"))
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(tmp_path / "cut.json"))
    plain, cut = (HFTokenizer(tmp_path / name) for name in ("plain.json", "cut.json"))
    texts = [TEXT, "a"]
    expected = [plain.encode(text).tolist() for text in texts]
    assert len(expected[0]) > 8 > len(expected[1])
    assert [cut.encode(text).tolist() for text in texts] == expected
    assert [ids.tolist() for ids in cut.encode_many(texts)] == expected


def test_ids_of_a_vocabulary_with_holes_are_below_its_size(tmp_path):
    vocab = {"a": 0, "b": 1, "</s>": 2, "ab": 70_000}
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")])).save(str(tmp_path / "t.json"))
    tokenizer = HFTokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.encode("aab").tolist() == [0, 70_000]
    assert tokenizer.token_text(5) == "<5>"


def test_an_end_that_only_the_config_names_is_part_of_the_identity(bpe, tmp_path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    usual = HFTokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    same = HFTokenizer(tmp_path)
    config.write_text(json.dumps({"eos_token": "<stop>"}))
    other_end = HFTokenizer(tmp_path)
    config.write_text(json.dumps({"bos_token": "<stop>", "add_bos_token": True}))
    with_beginning = HFTokenizer(tmp_path)
    assert same.identity == usual.identity
    assert len({one.identity for one in (usual, other_end, with_beginning)}) == 3


@pytest.mark.parametrize("kind", ["json", "sentencepiece", "t5"])
def test_a_lone_surrogate_is_a_question_mark_to_every_tokenizer(kind, bpe, t5_model, tmp_path):
    bpe.save(str(tmp_path / "t.json"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 4),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "s.model").write_bytes(model.getvalue())
    paths = {"json": tmp_path / "t.json", "sentencepiece": tmp_path / "s.model", "t5": t5_model}
    tokenizer = load(str(paths[kind]))
    expected = tokenizer.encode("a?b").tolist()
    assert tokenizer.encode("a\ud800b").tolist() == expected
    assert [ids.tolist() for ids in tokenizer.encode_many(["a\ud800b"])] == [expected]
