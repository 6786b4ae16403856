"""``expertmesh generate RUN``: text from a trained model, as it is made."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertmesh.data import Tokenizer

HELP = "write text with a trained run; needs the extra hf"

_NEW_TOKENS = 256


def main(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: What follows ``expertmesh generate``.

    Returns:
        The exit status.

    Raises:
        UserError: If the folder holds no usable run, an option is out of range, or transformers
            is not installed.
    """
    args = _parser().parse_args(argv)
    _check(args)

    # Here, so that `expertmesh --help` does not wait for torch. First what may be missing.
    from expertmesh.errors import require

    require("transformers", extra="hf")
    from expertmesh.data import load_tokenizer
    from expertmesh.train.finished import load_run

    trained = load_run(args.run)
    tokenizer = load_tokenizer(trained.run.data.tokenizer, cache=trained.run.data.cache)
    samples = _Sampler(trained.model, tokenizer, args)
    written = []
    for index in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {index + 1} of {args.num_samples}")
        written.append(samples.sample(args.seed + index, _print_piece))
        print()
    if args.output is not None:
        args.output.write_text("\n\n".join(written) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertmesh generate", description=HELP.capitalize() + "."
    )
    parser.add_argument("run", metavar="RUN", help="folder that `expertmesh train` wrote")
    parser.add_argument("--prompt", default="", help="what the text begins with")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="tokens to write (default: 256, or what the model's max_seq_len leaves)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus; 1 keeps all tokens")
    parser.add_argument("--top-k", type=int, default=0, help="likeliest tokens kept; 0 keeps all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=1, metavar="N")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the text there too")
    return parser


def _check(args: argparse.Namespace) -> None:
    from expertmesh.errors import UserError

    ranges: dict[str, tuple[str, bool]] = {
        "max_new_tokens": ("at least 1", args.max_new_tokens is None or args.max_new_tokens >= 1),
        "temperature": ("at least 0", args.temperature >= 0),
        "top_p": ("above 0 and at most 1", 0 < args.top_p <= 1),
        "top_k": ("at least 0", args.top_k >= 0),
        "num_samples": ("at least 1", args.num_samples >= 1),
    }
    for name, (expected, holds) in ranges.items():
        if not holds:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be {expected}, got {getattr(args, name)}")


def _print_piece(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _new_tokens(asked: int | None, num_prompt: int, max_seq_len: int) -> int:
    """How many tokens to write: the positions that the model has are all there is."""
    from expertmesh.errors import UserError

    room = max_seq_len - num_prompt
    if room < 1:
        raise UserError(
            f"--prompt must be shorter than the model's max_seq_len={max_seq_len} tokens, "
            f"got {num_prompt}; shorten it"
        )
    if asked is not None and asked > room:
        raise UserError(
            f"--max-new-tokens must be at most {room} (max_seq_len={max_seq_len} less "
            f"{num_prompt} tokens of the prompt), got {asked}; set --max-new-tokens={room}"
        )
    return min(_NEW_TOKENS, room) if asked is None else asked


class _Sampler:
    """One model, one prompt, one way to sample."""

    def __init__(self, model: Any, tokenizer: "Tokenizer", args: argparse.Namespace) -> None:
        import torch

        from expertmesh.hf import as_transformers

        self.tokenizer = tokenizer
        # Any: transformers types `generate` for its own base class only.
        self.adapter: Any = as_transformers(
            model, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id
        )
        # An empty prompt begins where a document does: after the end of the one before.
        ids = [int(token) for token in tokenizer.encode(args.prompt)] or [tokenizer.eos_id]
        self.prompt = torch.tensor([ids], device=model.embedding.weight.device)
        new_tokens = _new_tokens(args.max_new_tokens, len(ids), model.config.max_seq_len)
        self.options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
        if args.temperature > 0:
            self.options |= {
                "do_sample": True,
                "temperature": args.temperature,
                "top_p": args.top_p,
                "top_k": args.top_k,
            }
        # A vocabulary padded for speed has ids that no text belongs to.
        if beyond := list(range(tokenizer.vocab_size, model.config.vocab_size)):
            self.options["suppress_tokens"] = beyond

    def sample(self, seed: int, show: Callable[[str], None]) -> str:
        """One text, prompt included; ``show`` gets it piece by piece."""
        import torch

        torch.manual_seed(seed)
        pieces = _Pieces(self.tokenizer, show)
        self.adapter.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            streamer=pieces,
            **self.options,
        )
        return pieces.text


class _Pieces:
    """A streamer in transformers' sense: decodes tokens as they come.

    A character may take several tokens, so what ends in U+FFFD waits for the next one.
    """

    def __init__(self, tokenizer: "Tokenizer", show: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: Any) -> None:
        """Tokens: the prompt first, then one at a time."""
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._show(text)

    def end(self) -> None:
        """Nothing more comes."""
        self._show(self.tokenizer.decode(self.ids))

    def _show(self, text: str) -> None:
        self.show(text[len(self.text) :])
        self.text = text
