"""The notebook of the conversion, run as a user runs it."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import expertmesh
from expertmesh.models import DecoderLM, decoder_preset

NOTEBOOK = Path(expertmesh.__file__).parents[1] / "examples/openmoe/convert_and_run.ipynb"


def said(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_it_converts_loads_and_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    text = "\n".join(said(cell) for cell in notebook.cells)
    assert "target.decoder.decoder_norm.scale" in text
    assert text.count("read back: names, shapes and SHA-256 of every tensor agree") == 3
    assert re.search(r"openmoe: \d+ tensors, .* all as in .*checkpoint_0", text)
    config = decoder_preset("openmoe-test", vocab_size=512)
    assert f"OpenMoeForCausalLM, {config.num_params:,} parameters" in text
    found = re.search(r"\[0, 17, 42, 7, [\d, ]+\]", text)
    assert found is not None
    assert found[0] == str(greedy(DecoderLM(config).bfloat16().float().eval(), [0, 17, 42, 7], 12))


@torch.no_grad()
def greedy(model: DecoderLM, tokens: list[int], num_new: int) -> list[int]:
    """The likeliest tokens, by the decoder alone; up to the end of the text."""
    for _ in range(num_new):
        tokens = [*tokens, int(model(torch.tensor([tokens]))[0, -1].argmax())]
        if tokens[-1] == 1:
            break
    return tokens
