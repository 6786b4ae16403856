"""The example that spreads a model over devices, RAM and disk, run as a user would."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import expertmesh.hf  # noqa: F401
from tests.openmoe.folders import write_folder
from tests.openmoe.vocabulary import write_small

EXAMPLE = Path(__file__).parents[2] / "examples" / "openmoe" / "inference_on_multi_devices.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openmoe")
    vocabulary = write_small(tmp_path_factory.mktemp("vocabulary"))
    write_folder(path, tokenizer=vocabulary, vocab_size=1000)
    return path


def run(folder: Path, *options: str) -> str:
    command = [sys.executable, str(EXAMPLE), "--model", str(folder), "--dtype", "float32"]
    command += ["--question", "how many?", "--max-new-tokens", "5", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def answer(folder: Path) -> str:
    """What the whole model on the CPU says."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "how many?"}], return_tensors="pt"
    )
    made = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_map_by_name_over_ram_and_disk(folder: Path, tmp_path: Path) -> None:
    out = run(
        folder,
        "--device-map",
        '{"": "cpu", "model.layers.1.mlp.experts": "disk", "lm_head": "disk"}',
        "--offload-folder",
        str(tmp_path),
    )
    assert "  disk  model.blocks.1.moe.experts\n" in out
    assert "  disk  model.head\n" in out
    assert "   cpu  model.blocks.0\n" in out
    assert out.endswith(answer(folder) + "\n")


def test_a_map_by_memory_over_ram_and_disk(folder: Path, tmp_path: Path) -> None:
    memory = ["--max-memory", "cpu=3MB,disk=1GB", "--offload-folder", str(tmp_path)]
    out = run(folder, *memory)
    devices = {line.split()[0] for line in out.splitlines() if "  model." in line}
    assert devices == {"cpu", "disk"}
    assert out.endswith(answer(folder) + "\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--device-map", '{"": "cpu", "lm_head": "disk"}'],
            "error: device_map puts modules on disk, where they are written in another layout; "
            "set offload_folder",
        ),
        (["--device-map", '{"": "cpu", "head": "disk"}'], "error: device_map names what the model"),
    ],
)
def test_mistakes_are_one_line(folder: Path, options: list[str], told: str) -> None:
    command = [sys.executable, str(EXAMPLE), "--model", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
