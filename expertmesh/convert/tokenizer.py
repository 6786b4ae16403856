"""A tokenizer's files, to be copied beside a model."""

import re
from pathlib import Path

from expertmesh.errors import UserError

NAMES = (
    "spiece.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
)


_VERSION = re.compile(r"(?<=\.model)\.v\d+$")


def tokenizer_files(path: Path) -> list[Path]:
    """Those of a folder, among them every SentencePiece ``.model``, or one file itself.

    Raises:
        UserError: If there are none.
    """
    if path.is_file():
        return [path]
    names = dict.fromkeys((*NAMES, *sorted(file.name for file in path.glob("*.model"))))
    if found := [path / name for name in names if (path / name).is_file()]:
        return found
    raise UserError(f"{path} has no tokenizer; expected one of {', '.join(NAMES)}")


def name_beside_model(file: Path) -> str:
    """What a tokenizer's file is called beside a model: Mistral's packages number theirs."""
    return _VERSION.sub("", file.name)
