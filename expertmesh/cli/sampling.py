"""What `generate` and `chat` share: how tokens are drawn, and text shown as it is made."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

NEW_TOKENS = 256
"""Tokens written unless another number is asked for, if there are positions for them."""

Decode = Callable[[Sequence[int]], str]
Show = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how tokens are drawn."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens to write (default: 256, or as many as the model has positions left)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 keeps all tokens")
    parser.add_argument("--top-k", type=int, default=0, help="likeliest tokens kept; 0 keeps all")
    parser.add_argument("--seed", type=int, default=0)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what is out of range, or would do nothing.

    Raises:
        UserError: Names the option.
    """
    check_ranges(
        args,
        {
            "max_new_tokens": (
                "at least 1",
                args.max_new_tokens is None or args.max_new_tokens >= 1,
            ),
            # Logits over less than this, or infinity over infinity, are no numbers.
            "temperature": (
                "0, or at least 1e-6 and finite",
                args.temperature == 0 or 1e-6 <= args.temperature < math.inf,
            ),
            "top_p": ("above 0 and at most 1", 0 < args.top_p <= 1),
            "top_k": ("at least 0", args.top_k >= 0),
            "seed": ("at least -2**63 and below 2**63", -(2**63) <= args.seed < 2**63),
        },
    )

    if args.temperature == 0 and (args.top_p != 1 or args.top_k != 0):
        from expertmesh.errors import UserError

        raise UserError(
            "--temperature 0 takes the likeliest token, whatever --top-p and --top-k keep, got "
            f"--top-p {args.top_p} and --top-k {args.top_k}; leave them out, or set a temperature"
        )


def check_ranges(args: argparse.Namespace, ranges: dict[str, tuple[str, bool]]) -> None:
    """Refuse the first option that is not what it must be.

    Raises:
        UserError: Names it.
    """
    from expertmesh.errors import UserError

    for name, (expected, holds) in ranges.items():
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}, got {getattr(args, name)}")


def check_text(what: str, text: str) -> None:
    """Refuse bytes that are no text: they come as lone surrogates, which no tokenizer takes.

    Raises:
        UserError: Names what holds them.
    """
    from expertmesh.errors import UserError

    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(text[error.start : error.end])
        raise UserError(f"{what} must be UTF-8 text, got {shown} in it; convert it first") from None


def drawing(args: argparse.Namespace) -> dict[str, Any]:
    """The options as arguments of transformers' ``generate``."""
    if args.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
    }


def print_piece(piece: str) -> None:
    """Show text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


class Pieces:
    """A streamer in transformers' sense: decodes tokens as they come.

    A character may take several tokens, so what ends in U+FFFD waits for the next one; so does
    what may be the beginning of an ending, which is never shown.

    Args:
        decode: Ids to text.
        show: Is given the text piece by piece.
        with_prompt: Whether the prompt is part of it.
        endings: Ids that end the text where they stand at its end.
    """

    def __init__(
        self,
        decode: Decode,
        show: Show,
        *,
        with_prompt: bool = True,
        endings: Sequence[Sequence[int]] = (),
    ) -> None:
        self.decode = decode
        self.show = show
        self.endings = [tuple(ending) for ending in endings]
        self.ids: list[int] = []
        self.text = ""
        self._skips = not with_prompt

    def put(self, value: Any) -> None:
        """Tokens: the prompt first, then one at a time."""
        if self._skips:
            self._skips = False
            return
        self.ids += value.flatten().tolist()
        held = max((_begun(ending, self.ids) for ending in self.endings), default=0)
        text = self.decode(self.ids[: len(self.ids) - held])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        """Nothing more comes."""
        for ending in self.endings:
            if _begun(ending, self.ids) == len(ending):
                del self.ids[-len(ending) :]
        self._show(self.decode(self.ids))

    def _show(self, text: str) -> None:
        self.show(text[len(self.text) :])
        self.text = text


def _begun(ending: tuple[int, ...], ids: Sequence[int]) -> int:
    """How many of the last ids are the first of an ending."""
    lengths = range(min(len(ending), len(ids)), 0, -1)
    return next((n for n in lengths if tuple(ids[-n:]) == ending[:n]), 0)
