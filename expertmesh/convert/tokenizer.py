"""A tokenizer's files, to be copied beside a model."""

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
    "chat_template.jinja",
)


def tokenizer_files(path: Path) -> list[Path]:
    """Those of a folder, or one file itself.

    Raises:
        UserError: If there are none.
    """
    if path.is_file():
        return [path]
    if found := [path / name for name in NAMES if (path / name).is_file()]:
        return found
    raise UserError(f"{path} has no tokenizer; expected one of {', '.join(NAMES)}")
