"""Questions and answers out of records of the usual shapes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.errors import UserError

_SHAPES = (("prompt", "completion"), ("instruction", "output"))


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        question: What is asked, with its input.
        answer: What is to be learned.
        joint: What stands between the two where a template has nothing of its own: nothing where
            the record is made to be read on, else a line break.
    """

    question: str
    answer: str
    joint: str = "\n"


@dataclass(frozen=True)
class Conversation:
    """One or more turns, and what the model is told before them."""

    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def is_answered(self) -> bool:
        """Whether every answer has text."""
        return all(turn.answer.strip() for turn in self.turns)


def conversation(record: Any, where: str, fields: Sequence[str] = ()) -> Conversation:
    """What a record says.

    Args:
        record: Has ``prompt`` and ``completion``; or ``instruction``, ``output`` and perhaps
            ``input``; or ``messages``, a list of ``role`` (system first, then user and assistant in
            turn) and ``content``.
        where: Names the record in errors.
        fields: Names of two other keys, of the question and of the answer.

    Raises:
        UserError: If it is none of these.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected an object with a prompt, got {record!r:.40}")
    if not fields and isinstance(record.get("messages"), Sequence):
        return _messages(record["messages"], where)
    shapes = [tuple(fields)] if fields else _SHAPES
    for question, answer in shapes:
        if question in record and answer in record:
            return Conversation((_turn(record, question, answer, where),))
    usual = "prompt and completion, or instruction and output, or messages"
    raise UserError(
        f"{where}: expected {' and '.join(fields) or usual}, got {list(record)!r:.200}; "
        'name the two keys in data.fields, as in data.fields = ["question", "answer"]'
    )


def _turn(record: Mapping[str, Any], question: str, answer: str, where: str) -> Turn:
    asked, answered = _text(record, question, where), _text(record, answer, where)
    if question == "instruction" and record.get("input"):
        asked = f"{asked}\n{_text(record, 'input', where)}"
    return Turn(asked, answered, "" if question == "prompt" else "\n")


def _messages(messages: Sequence[Any], where: str) -> Conversation:
    texts: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: message {number} is not an object but {message!r:.40}")
        place = f"{where}: message {number}"
        texts.append((_text(message, "role", place), _text(message, "content", place)))
    system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
    roles = [role for role, _ in texts]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(
            f"{where}: expected messages of user and assistant in turn, the last of the assistant, "
            f"got {roles or 'none'}"
        )
    contents = [content for _, content in texts]
    turns = zip(contents[::2], contents[1::2], strict=True)
    return Conversation(tuple(Turn(asked, answered) for asked, answered in turns), system)


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is not text but {value!r:.40}")
    return value
