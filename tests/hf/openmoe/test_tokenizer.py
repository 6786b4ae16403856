"""umT5 as OpenMoE reads it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from expertmesh.data.templates import OPENMOE_TEMPLATE
from expertmesh.errors import UserError
from expertmesh.hf import OpenMoeTokenizer
from tests.openmoe.folders import write_folder
from tests.openmoe.vocabulary import umt5, write_small

QUERY = "Question: How do I kill a process? Answer:"
PROMPT = f"""<<SYS>>
You are a helpful, respectful and honest assistant.
<</SYS>>

<s>[INST] {QUERY} [/INST]"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OpenMoeTokenizer:
    """A small vocabulary and three sentinels."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_small(folder)
    return OpenMoeTokenizer.from_pretrained(folder, extra_ids=3)


def test_text_begins_with_id_0_and_has_no_end(small: OpenMoeTokenizer) -> None:
    pieces = small.sp_model.encode("the router says")
    encoded = small("the router says")
    assert encoded["input_ids"] == [0, *pieces]
    assert encoded["attention_mask"] == [1] * (1 + len(pieces))
    assert small("the router says", add_special_tokens=False)["input_ids"] == pieces
    assert small("")["input_ids"] == [0]
    assert (small.bos_token_id, small.eos_token_id, small.pad_token_id) == (0, 1, 0)


def test_batches_are_padded_on_the_left(small: OpenMoeTokenizer) -> None:
    batch = small(["a", "the router says"], padding=True, return_tensors="pt")
    short, long = small("a")["input_ids"], small("the router says")["input_ids"]
    missing = len(long) - len(short)
    assert batch["input_ids"].tolist() == [[0] * missing + short, long]
    assert batch["attention_mask"].tolist() == [[0] * missing + [1] * len(short), [1] * len(long)]


def test_marks_within_a_text_are_text_and_sentinels_are_not(small: OpenMoeTokenizer) -> None:
    plain = "[INST] <s> a </s>"
    assert small(plain)["input_ids"] == [0, *small.sp_model.encode(plain)]
    size = small.sp_model.get_piece_size()
    assert len(small) == size + 3
    assert small.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_2>"]) == [size + 2, size]
    ids = small("<pad>a<extra_id_1> go", add_special_tokens=False)["input_ids"]
    encode = small.sp_model.encode
    assert ids == [0, *encode("a"), size + 1, *encode(" go")]


def test_an_end_mark_alone_is_text_too(small: OpenMoeTokenizer) -> None:
    pieces = small.sp_model.encode("</s>")
    assert small("</s>")["input_ids"] == [0, *pieces]
    assert small("<pad></s><pad>a")["input_ids"] == [0, 0, *pieces, 0, *small.sp_model.encode("a")]
    assert small.decode([0, *pieces], skip_special_tokens=True) == "</s>"
    # Ids are named as before: the end that is written stays the token.
    assert small.convert_tokens_to_ids("</s>") == 1


def test_half_a_character_is_a_question_mark(small: OpenMoeTokenizer) -> None:
    assert small("a\ud83d b")["input_ids"] == small("a? b")["input_ids"]


def test_decoding_gives_the_text_back(small: OpenMoeTokenizer) -> None:
    text = "what is ½ of it?\n\nforty two  élan"
    ids = small(text)["input_ids"]
    assert small.decode(ids, skip_special_tokens=True) == text
    assert small.decode([*ids, 1]) == f"<pad>{text}</s>"


def test_the_chat_template_is_the_seeds_prompt(small: OpenMoeTokenizer) -> None:
    messages = [{"role": "user", "content": QUERY}]
    assert small.apply_chat_template(messages, tokenize=False) == PROMPT
    assert OPENMOE_TEMPLATE.prompt(QUERY) == PROMPT
    as_read = small.apply_chat_template(messages, add_generation_prompt=True)
    assert as_read["input_ids"] == small(PROMPT)["input_ids"]
    batch = small.apply_chat_template([messages] * 2, return_tensors="pt", return_dict=False)
    assert torch.equal(batch, torch.tensor([small(PROMPT)["input_ids"]] * 2))


def test_further_turns_follow_a_spelled_out_end(small: OpenMoeTokenizer) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "six?"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "and?"},
    ]
    assert small.apply_chat_template(messages, tokenize=False) == (
        "<<SYS>>\nbe brief\n<</SYS>>\n\n<s>[INST] six? [/INST] seven </s><s>[INST] and? [/INST]"
    )
    with pytest.raises(Exception, match="role must be system, user or assistant, got tool"):
        small.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_saved_and_loaded(small: OpenMoeTokenizer, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    again = OpenMoeTokenizer.from_pretrained(tmp_path)
    assert again(PROMPT)["input_ids"] == small(PROMPT)["input_ids"]
    assert len(again) == len(small)
    messages = [{"role": "user", "content": QUERY}]
    assert again.apply_chat_template(messages, tokenize=False) == PROMPT


def test_a_folder_cannot_overrule_the_rules(small: OpenMoeTokenizer, tmp_path: Path) -> None:
    shutil.copy(small.vocab_file, tmp_path / "spiece.model")
    mark = {"content": "<s>", "special": True, "lstrip": False, "rstrip": False}
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "bos_token": "<s>",
        "padding_side": "right",
        "added_tokens_decoder": {"2": mark},
        "additional_special_tokens": ["<extra_id_0>"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = OpenMoeTokenizer.from_pretrained(tmp_path, extra_ids=3)
    assert loaded(PROMPT)["input_ids"] == small(PROMPT)["input_ids"]
    assert loaded.padding_side == "left"
    assert len(loaded) == len(small)


def test_without_a_vocabulary_the_command_that_fetches_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"spiece\.model.*expertmesh data fetch tokenizer-umt5"):
        OpenMoeTokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
def test_ids_of_umt5_itself(tmp_path: Path) -> None:
    write_folder(tmp_path, auto_map=True, tokenizer=umt5())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert isinstance(tokenizer, OpenMoeTokenizer)
    # Recorded of two packages that ship umT5; the end mark that these add is left out here.
    ids = [122018, 6732, 315, 18154, 283, 7528, 339, 2482, 274]
    assert tokenizer("translate English to German: That is good.")["input_ids"] == [0, *ids]
    assert len(tokenizer) == 256_300
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_299>"]) == [256_299, 256_000]
    # What the stop rule looks for.
    assert tokenizer("done </s>")["input_ids"][-3:] == [15501, 281, 926]
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"], skip_special_tokens=True) == PROMPT
