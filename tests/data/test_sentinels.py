import shutil

import pytest

from expertmesh.data.sentinels import ByteSentinelTokenizer, T5Tokenizer
from expertmesh.data.tokenizer import load_tokenizer as load

TEXT = "The experts\n  share </s> the é 語 work. <s>"


def test_bytes_with_sentinels():
    tokenizer = load("byte-ul2")
    assert isinstance(tokenizer, ByteSentinelTokenizer)
    assert tokenizer.encode(TEXT).tolist() == list(TEXT.encode())
    assert tokenizer.decode([*TEXT.encode(), 256, 257, 383, 258]) == TEXT
    assert list(tokenizer.sentinel_ids) == list(range(383, 257, -1))
    texts = [tokenizer.token_text(i) for i in range(384)]
    assert len(set(texts)) == 384
    assert (texts[383], texts[382], texts[65]) == ("<extra_id_0>", "<extra_id_1>", "A")
    assert tokenizer.bos_id is None


def test_the_t5_family(t5_model):
    tokenizer = load(str(t5_model))
    assert isinstance(tokenizer, T5Tokenizer)
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (0, 0, 1)
    pieces = tokenizer.num_pieces
    assert tokenizer.vocab_size == pieces + 20
    assert list(tokenizer.sentinel_ids) == list(range(pieces + 19, pieces - 1, -1))
    ids = tokenizer.encode(TEXT).tolist()
    assert not {0, 1, 2, 3} & set(ids)
    assert tokenizer.decode([0, *ids, 1, pieces, pieces + 19, pieces + 70]) == TEXT
    texts = [tokenizer.token_text(i) for i in range(tokenizer.vocab_size)]
    assert all(text.isprintable() and text for text in texts)
    assert texts[-1] == "<extra_id_0>"
    assert texts[pieces] == "<extra_id_19>"
    assert tokenizer.token_text(pieces + 70) == f"<{pieces + 70}>"


def test_t5_has_100_extra_ids_unless_something_says_otherwise(t5_model, tmp_path):
    shutil.copy(t5_model / "spiece.model", tmp_path / "spiece.model")
    tokenizer = load(str(tmp_path / "spiece.model"))
    assert tokenizer.vocab_size == tokenizer.num_pieces + 100
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load(str(tmp_path)).identity == tokenizer.identity
    assert load(str(t5_model)).identity != tokenizer.identity


def test_its_model_wins_over_a_tokenizer_json(t5_model, tmp_path):
    shutil.copytree(t5_model, tmp_path / "both")
    (tmp_path / "both" / "tokenizer.json").write_text("{}")
    assert isinstance(load(str(tmp_path / "both")), T5Tokenizer)


@pytest.mark.slow
def test_umt5s_tokenizer_really_comes():
    tokenizer = load("tokenizer-umt5")
    assert (tokenizer.vocab_size, tokenizer.num_pieces) == (256_300, 256_000)
    assert tokenizer.sentinel_ids[0] == 256_299
    ids = tokenizer.encode("translate English to German: That is good.").tolist()
    assert ids == [122018, 6732, 315, 18154, 283, 7528, 339, 2482, 274]
    assert tokenizer.encode("a </s>").tolist()[1:] == [15501, 281, 926]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert [tokenizer.token_text(i) for i in (0, 1, 256_000)] == ["<pad>", "</s>", "<extra_id_299>"]
    assert len(tokenizer.encode("[S2S] ")) == 6
