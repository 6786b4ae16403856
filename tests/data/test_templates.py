import pytest

from expertmesh.data.conversation import Conversation, Turn
from expertmesh.data.templates import OPENMOE_TEMPLATE, find_template
from expertmesh.errors import UserError


def text(name, conversation):
    return "".join(piece for piece, _ in find_template(name).pieces(conversation))


def test_openmoes_prompt_to_the_character():
    query = "Question: How do I kill a process? Answer:"
    assert OPENMOE_TEMPLATE.prompt(query) == (
        "<<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\n"
        "<s>[INST] Question: How do I kill a process? Answer: [/INST]"
    )


def test_openmoes_answers_are_learned_and_nothing_else():
    pieces = OPENMOE_TEMPLATE.pieces(Conversation((Turn("q", "a"), Turn("r", "b")), "Be brief."))
    assert pieces == [
        ("<<SYS>>\nBe brief.\n<</SYS>>\n\n<s>[INST] q [/INST]", False),
        (" a", True),
        (" </s>", True),
        ("<s>[INST] r [/INST]", False),
        (" b", True),
    ]


def test_plain_adds_nothing_to_a_prompt_and_its_completion():
    assert text("plain", Conversation((Turn("Input: 2\nOutput:", " 4", ""),))) == (
        "Input: 2\nOutput: 4"
    )


def test_plain_puts_other_shapes_on_lines():
    turns = (Turn("do\nthis", "a"), Turn("and that", "b"))
    assert text("plain", Conversation(turns, "sys")) == "sys\ndo\nthis\na\nand that\nb"
    learned = [learns for _, learns in find_template("plain").pieces(Conversation(turns))]
    assert learned == [False, True, False, True]


def test_an_unknown_template():
    with pytest.raises(UserError, match="one of 'plain', 'openmoe', got 'openmo'; did you mean"):
        find_template("openmo")
