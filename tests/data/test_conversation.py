import pytest

from expertmesh.data.conversation import Conversation, Turn, conversation
from expertmesh.errors import UserError


def message(role, content="x"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "turn"),
    [
        ({"prompt": "q ", "completion": "a"}, Turn("q ", "a", "")),
        ({"instruction": "do", "output": "a"}, Turn("do", "a")),
        ({"instruction": "do", "input": "", "output": "a"}, Turn("do", "a")),
        ({"instruction": "do", "input": "this", "output": "a"}, Turn("do\nthis", "a")),
        ({"messages": [message("user", "q"), message("assistant", "a")]}, Turn("q", "a")),
    ],
)
def test_the_usual_shapes(record, turn):
    assert conversation(record, "f:1") == Conversation((turn,))


def test_several_turns_and_a_system_message():
    roles = ["system", "user", "assistant", "user", "assistant"]
    record = {"messages": [message(role, str(n)) for n, role in enumerate(roles)]}
    assert conversation(record, "f:1") == Conversation((Turn("1", "2"), Turn("3", "4")), "0")


def test_named_fields_win():
    record = {"prompt": "no", "completion": "no", "q": "yes", "a": "it is"}
    assert conversation(record, "f:1", ("q", "a")).turns == (Turn("yes", "it is"),)


def test_an_answer_of_blanks_is_none():
    assert Conversation((Turn("q", "a"),)).is_answered
    assert not Conversation((Turn("q", "a"), Turn("r", " \n"))).is_answered


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("text", r"f:7: expected an object with a prompt, got 'text'"),
        ({"q": "x"}, r"f:7: expected prompt and completion, .*got \['q'\].*data\.fields"),
        ({"prompt": "x"}, r"f:7: expected prompt and completion"),
        ({"prompt": "x", "completion": None}, r"f:7: field 'completion' is not text but None"),
        ({"prompt": 3, "completion": "a"}, r"f:7: field 'prompt' is not text but 3"),
        ({"messages": []}, r"f:7: expected messages of user and assistant in turn.*got none"),
        ({"messages": [message("user")]}, r"in turn, the last of the assistant, got \['user'\]"),
        ({"messages": [message("system")]}, r"got none"),
        ({"messages": [message("assistant"), message("user")]}, r"got \['assistant', 'user'\]"),
        ({"messages": ["hello"]}, r"f:7: message 0 is not an object but 'hello'"),
        ({"messages": [{"role": "user"}]}, r"f:7: message 0: field 'content' is not text"),
    ],
)
def test_other_records_are_named(record, message):
    with pytest.raises(UserError, match=message):
        conversation(record, "f:7")


def test_missing_named_fields():
    with pytest.raises(UserError, match="expected q and a, got"):
        conversation({"prompt": "x", "completion": "y"}, "f:1", ("q", "a"))
