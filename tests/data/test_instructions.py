import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.data.conversation import Conversation, Turn
from expertmesh.data.dataset import IGNORE
from expertmesh.data.instructions import InstructionDataset, tokens_of
from expertmesh.data.templates import find_template
from expertmesh.data.tokenizer import ByteTokenizer, Tokenizer
from expertmesh.data.tokens import TokenStream

BYTES = ByteTokenizer()
PAD = 257


class Pairs(Tokenizer):
    """Two characters a token, from the text's beginning: a prompt's last one may be torn."""

    vocab_size, eos_id, pad_id, bos_id = 1 << 16, 0, 0, 0
    identity = "pairs"

    def encode(self, text):
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return np.array([sum(ord(c) << 8 * n for n, c in enumerate(p)) for p in pairs], np.int32)

    def decode(self, ids):
        return "".join(chr(i & 255) + (chr(i >> 8) if i >> 8 else "") for i in ids if i)

    def token_text(self, token_id):
        return self.decode([token_id])


def dataset(rows, seq_len, **options):
    """Rows of (number of prompt tokens, number of learned tokens); ids are counted through."""
    tokens, learned, offsets = [], [], [0]
    for prompt, answer in rows:
        tokens += range(len(tokens), len(tokens) + prompt + answer)
        learned += [False] * prompt + [True] * answer
        offsets.append(len(tokens))
    stream = TokenStream(np.array(tokens, np.uint16), np.array(offsets))
    return InstructionDataset(stream, np.array(learned), seq_len, pad_id=PAD, **options)


def test_prompt_and_padding_have_no_target():
    sample = dataset([(3, 2)], 6)[0]
    assert sample.tokens_S.tolist() == [0, 1, 2, 3, PAD, PAD]
    assert sample.targets_S.tolist() == [IGNORE, IGNORE, 3, 4, IGNORE, IGNORE]
    assert sample.num_tokens == 4


def test_the_prompt_trains_if_asked():
    sample = dataset([(3, 2)], 6, train_on_prompt=True)[0]
    assert sample.targets_S.tolist() == [1, 2, 3, 4, IGNORE, IGNORE]


def test_long_rows_are_cut_and_counted():
    data = dataset([(2, 3), (2, 5), (9, 1), (1, 1)], 4)
    assert [sample.tokens_S.tolist() for sample in data] == [
        [0, 1, 2, 3],
        [5, 6, 7, 8],
        [22, PAD, PAD, PAD],
    ]
    assert data[1].targets_S.tolist() == [IGNORE, 7, 8, 9]
    assert (data.num_truncated, data.num_without_answer, data.num_targets) == (1, 1, 7)
    assert len(dataset([(2, 3), (9, 1)], 4, train_on_prompt=True)) == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=8), st.integers(1, 12))
def test_every_sample_has_a_target_and_all_are_counted(rows, seq_len):
    data = dataset(rows, seq_len)
    counts = [int((data[i].targets_S != IGNORE).sum()) for i in range(len(data))]
    assert all(counts)
    assert sum(counts) == data.num_targets
    assert len(data) + data.num_without_answer == len(rows)


def test_bytes_of_a_conversation():
    ids, learned = tokens_of(Conversation((Turn("qu", "é", ""),)), find_template("plain"), BYTES)
    assert ids.tolist() == [*b"qu", *"é".encode(), 256]
    assert learned.tolist() == [False, False, True, True, True]


def test_turns_in_openmoes_format():
    turns = (Turn("q", "a"), Turn("r", "b"))
    ids, learned = tokens_of(Conversation(turns, "s"), find_template("openmoe"), BYTES)
    text = BYTES.decode(ids[:-1])
    shown = "".join(c if yes else "." for c, yes in zip(text, learned[:-1], strict=True))
    prompts = ["<<SYS>>\ns\n<</SYS>>\n\n<s>[INST] q [/INST]", "<s>[INST] r [/INST]"]
    assert text == f"{prompts[0]} a </s>{prompts[1]} b"
    assert shown == "." * len(prompts[0]) + " a </s>" + "." * len(prompts[1]) + " b"
    assert learned[-1]
    assert ids[-1] == 256


@pytest.mark.parametrize("question", ["ab", "abc"])
def test_a_token_across_the_border_belongs_to_the_answer(question):
    ids, learned = tokens_of(
        Conversation((Turn(question, "xyz", ""),)), find_template("plain"), Pairs()
    )
    assert ids[0] == Pairs.bos_id
    assert not learned[0]
    assert Pairs().decode(ids[learned]) == {"ab": "xyz", "abc": "cxyz"}[question]
    assert learned[-1]
