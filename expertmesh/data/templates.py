"""How a conversation is written as one text, and which parts of it are to be learned."""

from abc import ABC, abstractmethod
from typing import final

from expertmesh.data.conversation import Conversation
from expertmesh.errors import UserError, nearest

Piece = tuple[str, bool]
"""A part of the text, and whether it is to be learned."""
DEFAULT_SYSTEM = "You are a helpful, respectful and honest assistant."
"""What OpenMoE's chat model is told where nothing else is said."""


class Template(ABC):
    """A way to write a conversation."""

    @abstractmethod
    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The text in parts, first to last; the end of the text is not one of them."""


@final
class PlainTemplate(Template):
    """Question and answer one after the other, with nothing added to ``prompt, completion``."""

    def pieces(self, conversation: Conversation) -> list[Piece]:
        system = "" if conversation.system is None else conversation.system + "\n"
        found: list[Piece] = []
        for turn in conversation.turns:
            found += [(system + turn.question, False), (turn.joint + turn.answer, True)]
            system = "\n"
        return found


@final
class OpenMoeTemplate(Template):
    """The format of OpenMoE's chat model, which is Llama 2's with its parts in another order.

    Between turns the model writes ``</s>`` as text, as its own answers do.
    """

    def prompt(self, question: str, system: str = DEFAULT_SYSTEM) -> str:
        """What the model is given for a first question."""
        return f"<<SYS>>\n{system}\n<</SYS>>\n\n{self._question(question)}"

    def pieces(self, conversation: Conversation) -> list[Piece]:
        first, *others = conversation.turns
        system = DEFAULT_SYSTEM if conversation.system is None else conversation.system
        found: list[Piece] = [
            (self.prompt(first.question, system), False),
            (f" {first.answer}", True),
        ]
        for turn in others:
            found += [
                (" </s>", True),
                (self._question(turn.question), False),
                (f" {turn.answer}", True),
            ]
        return found

    def _question(self, question: str) -> str:
        return f"<s>[INST] {question} [/INST]"


OPENMOE_TEMPLATE = OpenMoeTemplate()
TEMPLATES: dict[str, Template] = {"plain": PlainTemplate(), "openmoe": OPENMOE_TEMPLATE}
"""Every template by its name in a run file."""


def find_template(name: str) -> Template:
    """The template of a name.

    Raises:
        UserError: For an unknown one, with the known ones.
    """
    if name not in TEMPLATES:
        raise UserError(
            f"data.template must be one of {', '.join(map(repr, TEMPLATES))}, "
            f"got {name!r}{nearest(name, TEMPLATES)}"
        )
    return TEMPLATES[name]
