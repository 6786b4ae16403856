"""A model that writes text, with its tokenizer: of a run, or of a folder that Auto classes load."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPES = {
    "auto": "auto",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "fp64": "float64",
}
_DESCRIPTIONS = ("config.json", "adapter_config.json")
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class TextModel:
    """What writing text takes.

    Attributes:
        model: Has transformers' ``generate``.
        encode: Text to what the model reads.
        decode: Ids to text without marks.
        positions: How many tokens it has positions for; None if it does not say.
        limit: What the model calls that number.
        num_tokens: Ids that text belongs to; the model may have more.
        tokenizer: transformers' tokenizer of a folder; None for a run.
    """

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    positions: int | None
    limit: str
    num_tokens: int
    tokenizer: Any = None

    def room(
        self, num_prompt: int, asked: int | None, usual: int, *, what: str = "--prompt"
    ) -> int:
        """How many tokens to write: the positions that the model has are all there is.

        Args:
            num_prompt: Tokens of the prompt.
            asked: As many as the user wants, if they say so.
            usual: As many as there are otherwise, if they have room.
            what: The prompt's name, for messages.

        Raises:
            UserError: If there are too few for the prompt, or for what was asked, or there is
                nothing to go on from.
        """
        from expertmesh.errors import UserError

        if num_prompt == 0:
            raise UserError(
                f"{what} must have at least one token, got none, and the tokenizer has no "
                "bos_token or eos_token to begin with; give some text"
            )
        if self.positions is None:
            return usual if asked is None else asked
        room = self.positions - num_prompt
        if room < 1:
            raise UserError(
                f"{what} must be shorter than the model's {self.limit}={self.positions} tokens, "
                f"got {num_prompt}; shorten it"
            )
        if asked is not None and asked > room:
            raise UserError(
                f"--max-new-tokens must be at most {room} ({self.limit}={self.positions} less "
                f"{num_prompt} tokens before them), got {asked}; set --max-new-tokens={room}"
            )
        return min(usual, room) if asked is None else asked

    def write(self, ids: Sequence[int], **options: Any) -> None:
        """Generate; ``options`` are transformers', a ``streamer`` among them."""
        import torch

        prompt = torch.tensor([list(ids)], device=self._device())
        # A vocabulary padded for speed has ids that no text belongs to.
        vocab_size = self.model.config.get_text_config().vocab_size
        if beyond := list(range(self.num_tokens, vocab_size)):
            options["suppress_tokens"] = beyond
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    def _device(self) -> Any:
        """Where ids go: weights on disk have no device, and hooks move the ids themselves."""
        devices = (param.device for param in self.model.parameters())
        return next((device for device in devices if device.type != "meta"), "cpu")


def of_run(run: str) -> TextModel:
    """From a folder that ``expertmesh train`` wrote.

    Raises:
        UserError: If it holds no usable run.
    """
    from expertmesh.data import load_tokenizer
    from expertmesh.hf import as_transformers
    from expertmesh.train.finished import load_run

    trained = load_run(run)
    tokenizer = load_tokenizer(trained.run.data.tokenizer, cache=trained.run.data.cache)
    model = trained.model

    def encode(text: str) -> list[int]:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # An empty prompt begins where a document does: after the end of the one before.
        return [*begin, *map(int, tokenizer.encode(text))] or [tokenizer.eos_id]

    return TextModel(
        as_transformers(model, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id),
        encode,
        tokenizer.decode,
        model.config.max_seq_len,
        "max_seq_len",
        tokenizer.vocab_size,
    )


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """The options that name a folder and say where its weights go."""
    parser.add_argument(
        "--model",
        metavar="PATH",
        required=required,
        help="folder that transformers' Auto classes load, OpenMoE's among them, or a hub name",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: the folder's")
    parser.add_argument(
        "--device-map",
        metavar="MAP",
        help="auto, a device, or JSON of module names to devices, cpu or disk "
        "(default: auto where there is a GPU, or with --max-memory)",
    )
    parser.add_argument(
        "--max-memory", metavar="MAP", help="for --device-map auto, such as 0=38GiB,cpu=50GiB"
    )
    parser.add_argument("--offload-folder", metavar="DIR", help="where weights on disk lie")


def of_folder(args: argparse.Namespace) -> TextModel:
    """From the folder or hub name ``args.model``.

    Raises:
        UserError: If it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import expertmesh.hf  # noqa: F401  # the Auto classes know OpenMoE after this
    from expertmesh.errors import UserError

    name = args.model
    # A name below a folder that is here was meant as a folder too: the hub is not asked.
    local = name.startswith(".") or ("/" in name and Path(name).parent.is_dir())
    if not name or (not Path(name).exists() and (local or not _HUB_NAME.fullmatch(name))):
        raise UserError(f"--model {name}: there is no such folder")
    _check_no_run(Path(name))
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in _DESCRIPTIONS):
        raise UserError(f"--model {name} has no config.json, so it is no folder of a model")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype = DTYPES[args.dtype]
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    options |= _placing(args)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except UserError:
        raise
    # Anything may be in a folder, and the libraries that read it raise what they like.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model {name} cannot be loaded: {reason}") from error
    _check_vocabulary(name, tokenizer, model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        ids = tokenizer(text)["input_ids"]
        begin = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        return list(ids) or [token for token in begin if token is not None][:1]

    return TextModel(
        model,
        encode,
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        "max_position_embeddings",
        len(tokenizer),
        tokenizer,
    )


def _check_no_run(folder: Path) -> None:
    """Refuse what ``expertmesh train`` wrote: transformers does not know what to make of it."""
    from expertmesh.errors import UserError
    from expertmesh.train.config import CONFIG
    from expertmesh.train.published import PUBLISHED

    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return
    published = folder / PUBLISHED
    advice = f"--model {published} holds its weights for transformers"
    if not published.is_dir():
        advice = (
            "train.save_published writes its weights for transformers, and so does "
            f"`expertmesh convert FAMILY {folder} OUT` if they are of a published family"
        )
    raise UserError(f"--model {folder} is a run: `expertmesh generate {folder}` reads it; {advice}")


def _placing(args: argparse.Namespace) -> dict[str, Any]:
    """``device_map`` and what goes with it, as transformers takes them."""
    import torch

    from expertmesh.errors import UserError

    device_map: Any = args.device_map
    if args.max_memory is not None and device_map not in (None, *_AUTOMATIC):
        raise UserError(
            f"--max-memory goes with --device-map auto, got --device-map {device_map}; "
            "leave one of them out"
        )
    if device_map is None:
        # Limits say where weights may go, also where there is no GPU.
        wanted = torch.cuda.is_available() or args.max_memory is not None
        device_map = "auto" if wanted else None
    elif device_map.startswith("{"):
        device_map = _json_map(device_map)
    elif device_map.isdigit():
        device_map = int(device_map)
    placing = {"device_map": device_map, "offload_folder": args.offload_folder}
    if args.max_memory is not None:
        placing["max_memory"] = _memory(args.max_memory)
    return {key: value for key, value in placing.items() if value is not None}


def _json_map(text: str) -> dict[str, Any]:
    from expertmesh.errors import UserError

    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise UserError(
            f"--device-map is no JSON ({error}); expected such as "
            '\'{"": 0, "model.layers.3": "cpu"}\''
        ) from error


def _memory(text: str) -> dict[int | str, str]:
    from expertmesh.errors import UserError

    entries = [entry.partition("=") for entry in text.split(",")]
    if not all(device and size for device, _, size in entries):
        raise UserError(f"--max-memory must be such as 0=38GiB,cpu=50GiB, got {text!r}")
    return {int(device) if device.isdigit() else device: size for device, _, size in entries}


def _check_vocabulary(name: str, tokenizer: Any, model: Any) -> None:
    from expertmesh.errors import UserError

    vocab_size = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"--model {name}: the tokenizer has {len(tokenizer)} tokens, the model only "
            f"vocab_size={vocab_size}; they do not belong together"
        )
