"""The page on models says what the code says."""

import re
from pathlib import Path

import torch

from expertmesh.models.__main__ import preset_table

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_table_is_the_commands_output() -> None:
    assert preset_table() in PAGE.read_text()


def test_the_snippets_run() -> None:
    torch.manual_seed(0)
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(snippet, names)
    assert names["logits"].shape == (2, 64, 258)
    assert names["text"].shape == (1, 24)
