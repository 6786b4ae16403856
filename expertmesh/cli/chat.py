"""``expertmesh chat``: a conversation with a chat model."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from expertmesh.cli import sampling
from expertmesh.errors import UserError

if TYPE_CHECKING:
    from expertmesh.cli.text_model import TextModel

HELP = "talk to a chat model, from a terminal or a pipe; needs the extra hf"

_NEW = "/new"


def main(argv: Sequence[str]) -> int:
    """Run the command: each line of input is a message, each answer follows it.

    Args:
        argv: What follows ``expertmesh chat``.

    Returns:
        The exit status.

    Raises:
        UserError: If the folder cannot be loaded or is no chat model's, an option is out of
            range, or a message from a pipe is too long.
    """
    args = _parser().parse_args(argv)
    sampling.check_options(args)
    sampling.check_text("--system", args.system or "")
    from expertmesh.errors import require

    require("transformers", extra="hf")
    import torch

    from expertmesh.cli.text_model import of_folder

    torch.manual_seed(args.seed)
    chat = _Chat(of_folder(args), args)
    terminal = sys.stdin.isatty()
    for message in _messages(terminal):
        if message == _NEW:
            chat.forget()
            continue
        try:
            chat.answer(message)
        except UserError as error:
            if not terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    from expertmesh.cli.text_model import add_model_options

    parser = argparse.ArgumentParser(
        prog="expertmesh chat",
        description=f"{HELP.capitalize()}. A line is a message; {_NEW} begins a new conversation.",
    )
    add_model_options(parser, required=True)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told to be")
    sampling.add_options(parser)
    return parser


def _messages(terminal: bool) -> Iterator[str]:
    """Lines that say something."""
    if terminal:
        print(f"{_NEW} begins a new conversation, Ctrl-D ends", file=sys.stderr)
    lines = iter(lambda: _line("> "), None) if terminal else sys.stdin
    try:
        for line in lines:
            if message := str(line).strip():
                yield message
    except UnicodeDecodeError as error:
        raise UserError(f"messages must be UTF-8 text: {error}; convert them first") from error


def _line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        print()
        return None


class _Chat:
    """One model, and what was said so far."""

    def __init__(self, model: "TextModel", args: argparse.Namespace) -> None:
        if not getattr(model.tokenizer, "chat_template", None):
            raise UserError(
                f"--model {args.model} has no chat template, so it is no chat model; "
                "use `expertmesh generate --model`"
            )
        self.model = model
        self.args = args
        self.system = [] if args.system is None else [{"role": "system", "content": args.system}]
        self.turns: list[dict[str, str]] = []

    def forget(self) -> None:
        """Begin again."""
        self.turns = []

    def answer(self, message: str) -> None:
        """Print the answer to a message, and remember both.

        Raises:
            UserError: If the message alone is too long, or no text.
        """
        sampling.check_text("the message", message)
        turns = [*self.turns, {"role": "user", "content": message}]
        ids, new_tokens, turns = self._fitting(turns)
        endings, criteria = self._stops(len(ids))
        pieces = sampling.Pieces(
            self.model.decode, sampling.print_piece, with_prompt=False, endings=endings
        )
        self.model.write(
            ids,
            streamer=pieces,
            max_new_tokens=new_tokens,
            stopping_criteria=criteria,
            **sampling.drawing(self.args),
        )
        print()
        self.turns = [*turns, {"role": "assistant", "content": pieces.text.strip()}]

    def _fitting(self, turns: list[dict[str, str]]) -> tuple[list[int], int, list[dict[str, str]]]:
        """Ids, how many new tokens there is room for, and the turns that are kept."""
        kept = turns
        while True:
            ids = self._ids(kept)
            try:
                room = self.model.room(
                    len(ids), self.args.max_new_tokens, sampling.NEW_TOKENS, what="the message"
                )
            except UserError:
                if len(kept) == 1:
                    raise
                kept = kept[2:]
                continue
            if len(kept) < len(turns):
                print("(the first turns no longer fit and are left out)", file=sys.stderr)
            return ids, room, kept

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        try:
            encoded = self.model.tokenizer.apply_chat_template(
                [*self.system, *turns], add_generation_prompt=True, return_dict=True
            )
        # A template is code of the folder's: many refuse roles in words of their own.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"--model {self.args.model}: its chat template cannot be filled: {reason}"
            ) from error
        return [int(token) for token in encoded["input_ids"]]

    def _stops(self, num_prompt: int) -> tuple[list[Sequence[int]], Any]:
        """OpenMoE spells out the end of an answer; the others have their end token."""
        from transformers import StoppingCriteriaList

        from expertmesh.hf import OpenMoeTokenizer, StopAtEndOfAnswer

        if not isinstance(self.model.tokenizer, OpenMoeTokenizer):
            return [], None
        stop = StopAtEndOfAnswer(num_prompt)
        return [stop.ending], StoppingCriteriaList([stop])
