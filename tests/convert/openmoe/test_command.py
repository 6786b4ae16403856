"""``expertmesh convert openmoe``: every kind of files into every other."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertmesh.cli.convert import main
from expertmesh.convert.openmoe import published_config
from expertmesh.convert.published import load_published, read_config
from expertmesh.convert.t5x import T5xCheckpoint
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM
from expertmesh.parallel.checkpoint.box import Box
from expertmesh.testing import assert_close
from tests.convert.openmoe import by_hand, t5x_files
from tests.openmoe import oracle
from tests.openmoe.test_architecture import SIZES
from tests.openmoe.test_architecture import config as sized

KINDS = ["published", "per-expert", "t5x"]
CONFIG = json.dumps(published_config(by_hand.CONFIG))


def write(
    path: Path, kind: str, tensors: dict[str, Tensor], compressor: str | None = "gzip"
) -> Path:
    """A folder of a kind, by the format's own package."""
    if kind == "t5x":
        t5x_files.write(path, tensors, compressor=compressor)
    else:
        path.mkdir(parents=True)
        save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(CONFIG)
    return path


def read(path: Path, kind: str) -> dict[str, Tensor]:
    if kind == "t5x":
        source = T5xCheckpoint(path)
        return {name: source.read(name, Box.whole(s.shape)) for name, s in source.tensors.items()}
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def run(*words: Any) -> None:
    assert main(["openmoe", *map(str, words)]) == 0


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return by_hand.model()


@pytest.mark.parametrize("to", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_into_every_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: DecoderLM, kind: str, to: str
) -> None:
    source = write(tmp_path / "from", kind, by_hand.BY_KIND[kind](model))
    run(source, tmp_path / "to", "--to", to, "--shard-gb", 1e-4)
    assert_same(read(tmp_path / "to", to), by_hand.BY_KIND[to](model))
    assert read_config(tmp_path / "to") == by_hand.CONFIG
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"from  {source}: {kind}, ")
    assert said[1].startswith(f"to    {tmp_path / 'to'}: {to}, ")
    assert said[2] == "read back: names, shapes and SHA-256 of every tensor agree"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["from", "to"]


def test_a_converted_t5x_checkpoint_computes_what_the_formulas_say(tmp_path: Path) -> None:
    tensors = oracle.random_checkpoint(SIZES)
    source = t5x_files.write(tmp_path / "checkpoint_3", by_hand.as_t5x(tensors))
    keys = published_config(sized())
    (tmp_path / "config.json").write_text(json.dumps(keys))
    run(source, tmp_path / "to", "--config", tmp_path / "config.json")
    model = DecoderLM(read_config(tmp_path / "to")).double().eval()
    load_published(model, tmp_path / "to")
    tokens = [0, 5, 22, 0, 7, 7, 13]
    found = model(torch.tensor([tokens]))[0]
    assert_close("logits", found, oracle.logits(tensors, tokens, SIZES))


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_dtypes(tmp_path: Path, model: DecoderLM, word: str, dtype: torch.dtype) -> None:
    source = write(tmp_path / "from", "t5x", by_hand.t5x(model))
    run(source, tmp_path / "to", "--dtype", word)
    expected = {name: tensor.to(dtype) for name, tensor in by_hand.published(model).items()}
    assert_same(read(tmp_path / "to", "published"), expected)
    keys = json.loads((tmp_path / "to" / "config.json").read_text())
    assert keys["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_bfloat16_arrays(tmp_path: Path, model: DecoderLM) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in by_hand.t5x(model).items()}
    run(write(tmp_path / "from", "t5x", tensors), tmp_path / "to")
    expected = {name: tensor.bfloat16() for name, tensor in by_hand.published(model).items()}
    assert_same(read(tmp_path / "to", "published"), expected)
    run(tmp_path / "to", tmp_path / "back", "--to", "t5x")
    assert_same(read(tmp_path / "back", "t5x"), tensors)


def test_what_float16_cannot_hold_is_an_error_and_leaves_nothing(
    tmp_path: Path, model: DecoderLM
) -> None:
    tensors = by_hand.published(model)
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], 1e5)
    source = write(tmp_path / "from", "published", tensors)
    with pytest.raises(UserError, match=r"lm_head.weight holds values beyond 65504, .* bf16"):
        run(source, tmp_path / "to", "--dtype", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_keys_and_tokenizer_of_the_source_go_along(tmp_path: Path, model: DecoderLM) -> None:
    source = write(tmp_path / "from", "published", by_hand.published(model))
    keys = json.loads(CONFIG) | {"model_type": "llama", "auto_map": {"a": "b.c"}, "pad": 5}
    (source / "config.json").write_text(json.dumps(keys))
    (source / "spiece.model").write_text("pieces")
    run(source, tmp_path / "to", "--to", "per-expert")
    found = json.loads((tmp_path / "to" / "config.json").read_text())
    assert (found["model_type"], found["pad"]) == ("openmoe", 5)
    assert "auto_map" not in found
    assert (tmp_path / "to" / "spiece.model").read_text() == "pieces"
    run(source, tmp_path / "other", "--tokenizer", source / "config.json")
    assert not (tmp_path / "other" / "spiece.model").exists()


def test_the_shape_is_found_without_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: DecoderLM
) -> None:
    from expertmesh.convert import command

    monkeypatch.setattr(command, "decoder_preset", lambda name: by_hand.CONFIG)
    source = t5x_files.write(tmp_path / "from", by_hand.t5x(model))
    run(source, tmp_path / "to")
    assert read_config(tmp_path / "to") == by_hand.CONFIG
    tensors = by_hand.t5x(model)
    del tensors["decoder/layers_1/mlp/expert/wo/kernel"]
    source = t5x_files.write(tmp_path / "less", tensors)
    with pytest.raises(UserError, match=r"missing: decoder/layers_1/mlp/expert/wo/kernel; give"):
        run(source, tmp_path / "nothing")


def test_a_shape_that_nobody_published_needs_a_configuration(
    tmp_path: Path, model: DecoderLM
) -> None:
    tensors = {f"encoder/{name}": tensor for name, tensor in by_hand.t5x(model).items()}
    source = t5x_files.write(tmp_path / "from", tensors)
    with pytest.raises(UserError, match=r"none of openmoe-base, openmoe-8b.* give a config.json"):
        run(source, tmp_path / "to")


def test_an_array_that_is_missing_is_named(tmp_path: Path, model: DecoderLM) -> None:
    tensors = by_hand.t5x(model)
    for layer in (1, 3):
        del tensors[f"decoder/layers_{layer}/mlp/router/router_weights/w/kernel"]
    tensors["decoder/layers_0/mlp/wi_0/kernel"] = torch.zeros(3, 5)
    source = write(tmp_path / "from", "t5x", tensors)
    message = (
        f"{source} does not fit the model; missing: "
        "decoder/layers_{1,3}/mlp/router/router_weights/w/kernel; "
        "misshapen: decoder/layers_0/mlp/wi_0/kernel (expected [64, 256], got [3, 5])"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        run(source, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, model: DecoderLM) -> None:
    source = write(tmp_path / "from", "published", by_hand.published(model))
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"to holds other files"):
        run(source, tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"from is what is read; give the path of another folder"):
        run(source, source)
    assert_same(read(source, "published"), by_hand.published(model))


def test_a_folder_that_holds_what_is_read_is_left_alone(tmp_path: Path, model: DecoderLM) -> None:
    tensors = by_hand.published(model)
    first = write(tmp_path / "first", "published", tensors)
    run(first, tmp_path / "to")
    inner = write(tmp_path / "to" / "inner", "published", tensors)
    with pytest.raises(UserError, match=r"to holds what is read; give the path of another folder"):
        run(inner, tmp_path / "to")
    assert_same(read(inner, "published"), tensors)


def test_a_folder_that_the_system_refuses_is_an_error_of_the_users(
    tmp_path: Path, model: DecoderLM
) -> None:
    source = write(tmp_path / "from", "published", by_hand.published(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/to cannot be written: Not a directory"):
        run(source, tmp_path / "file" / "to")


@pytest.mark.parametrize("kind", KINDS)
def test_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: DecoderLM, kind: str
) -> None:
    source = write(tmp_path / "from", "per-expert", by_hand.per_expert(model))
    run(source, tmp_path / "to", "--to", kind)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(tmp_path / "to", "--verify")
    run(source, tmp_path / "to", "--verify")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0].endswith("all as its manifest says")
    assert said[1].endswith(f"all as in {source}")


def spoil(path: Path, name: str) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] += 1
    save_file(tensors, file)


def test_verify_names_what_differs(tmp_path: Path, model: DecoderLM) -> None:
    source = write(tmp_path / "from", "published", by_hand.published(model))
    run(source, tmp_path / "to", "--to", "per-expert")
    for expert in (1, 2):
        spoil(tmp_path / "to", f"model.layers.3.mlp.experts.{expert}.up_proj.weight")
    name = re.escape("model.layers.3.mlp.experts.{1-2}.up_proj.weight")
    with pytest.raises(UserError, match=rf"is not what it should be; with other values: {name}$"):
        run(tmp_path / "to", "--verify")
    with pytest.raises(UserError, match=rf"to differs from .*from in {name}$"):
        run(source, tmp_path / "to", "--verify")
    (tmp_path / "to" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json cannot be read as a manifest"):
        run(tmp_path / "to", "--verify")


def test_what_is_written_wrongly_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: DecoderLM
) -> None:
    from expertmesh.convert.destination import SafetensorsDestination

    close = SafetensorsDestination.close

    def spoiled(destination: SafetensorsDestination, config: dict[str, Any]) -> None:
        close(destination, config)
        spoil(destination.folder, "lm_head.weight")

    monkeypatch.setattr(SafetensorsDestination, "close", spoiled)
    source = write(tmp_path / "from", "t5x", by_hand.t5x(model))
    with pytest.raises(UserError, match=r"with other values: lm_head.weight"):
        run(source, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


MEASURED = """
import os, sys, threading, time
from expertmesh.cli.convert import main
from expertmesh.convert import families, source, t5x
import tensorstore

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

main(["openmoe", sys.argv[1], sys.argv[1] + "-first", "--to", sys.argv[3]])
start, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
main(["openmoe", sys.argv[2], sys.argv[2] + "-to", "--to", sys.argv[3]])
done = True
watcher.join()
print(peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "to"),
    [("published", "per-expert"), pytest.param("t5x", "published", marks=pytest.mark.slow)],
)
def test_memory_is_near_the_largest_tensor_whatever_the_model(
    tmp_path: Path, model: DecoderLM, kind: str, to: str
) -> None:
    from expertmesh.convert.openmoe import layout
    from expertmesh.models import decoder_preset

    config = decoder_preset(
        "openmoe-test", vocab_size=500, dim=128, dense_hidden=512, expert_hidden=512, num_layers=32
    )
    tensors = {name: torch.randn(s) for name, s in layout(config, kind).their_shapes.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total > 40 * max(tensor.nbytes for tensor in tensors.values())
    large = write(tmp_path / "large", kind, tensors, compressor=None)
    (large / "config.json").write_text(json.dumps(published_config(config)))
    small = write(tmp_path / "small", kind, by_hand.BY_KIND[kind](model))
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(small), str(large), to],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout.splitlines()[-1]) < total / 3


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    tensors = by_hand.published(by_hand.model())
    source = write(tmp_path / "source", "published", tensors)
    first = tmp_path / "first"
    assert main(["openmoe", str(source), str(first)]) == 0
    before = read(first, "published")
    with pytest.raises(UserError, match=r"first is what is read; give the path of another folder"):
        main(["openmoe", str(first), f"{first}/../first", "--dtype", "bf16"])
    assert_same(read(first, "published"), before)
