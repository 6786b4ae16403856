"""Published folders into models on any mesh, and back."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expertmesh.convert.openmoe import layout, published_config
from expertmesh.convert.published import load_published, read_config, save_published
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM
from expertmesh.testing.ranks import run_on_ranks
from tests.convert.openmoe import by_hand, meshes
from tests.parallel.cuts import union

MESHES = [
    (1, 2, {}),
    (2, 3, {}),
    (2, 1, {"pp": 2}),
    (4, 2, {"ep": 4}),
    pytest.param(4, 3, {"ep": 2}, id="edp2-ep2-zero3"),
    pytest.param(4, 1, {"pp": 2, "ep": 2}, marks=pytest.mark.slow),
    pytest.param(4, 0, {"ep": 2, "etp": 2, "tp": 2}, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model() -> DecoderLM:
    return by_hand.model()


@pytest.fixture(scope="module")
def folder(model: DecoderLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("published") / "model", by_hand.published(model))


def write(folder: Path, tensors: dict[str, Tensor], num_files: int = 3) -> Path:
    """As the hub has them, by the format's own package."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(published_config(by_hand.CONFIG)))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::num_files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found = load_file(file)
        assert not set(found) & set(tensors)
        tensors |= found
    return tensors


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["published", "per-expert"])
@pytest.mark.parametrize("num_files", [1, 3])
def test_a_plain_model(tmp_path: Path, model: DecoderLM, kind: str, num_files: int) -> None:
    path = write(tmp_path / "model", by_hand.BY_KIND[kind](model), num_files)
    loaded = DecoderLM(read_config(path), seed=1)
    load_published(loaded, path)
    assert_same(loaded.state_dict(), model.state_dict())


def test_a_model_on_the_meta_device_is_given_memory(folder: Path, model: DecoderLM) -> None:
    with torch.device("meta"):
        loaded = DecoderLM(read_config(folder))
    load_published(loaded, folder, device="cpu")
    assert_same(loaded.state_dict(), model.state_dict())


def test_values_take_the_models_dtype(folder: Path, model: DecoderLM) -> None:
    loaded = DecoderLM(by_hand.CONFIG, seed=1).to(torch.bfloat16)
    load_published(loaded, folder)
    assert_same(loaded.state_dict(), {n: t.bfloat16() for n, t in model.state_dict().items()})


@pytest.mark.parametrize(("world", "zero", "degrees"), MESHES)
def test_any_mesh_loads(
    folder: Path, model: DecoderLM, world: int, zero: int, degrees: dict[str, Any]
) -> None:
    of_ranks = run_on_ranks(world, meshes.load, folder, zero, degrees)
    assert_same(union([values for values, _ in of_ranks]), dict(model.state_dict()))
    # Each rank reads what it holds, and nothing else.
    assert [ratio for _, ratio in of_ranks] == [1.0] * world


def test_a_mesh_in_bfloat16(folder: Path, model: DecoderLM) -> None:
    of_ranks = run_on_ranks(2, meshes.load, folder, 3, {"ep": 2}, torch.bfloat16)
    expected = {n: t.bfloat16() for n, t in model.state_dict().items()}
    assert_same(union([values for values, _ in of_ranks]), expected)


@pytest.mark.parametrize(("world", "zero", "degrees"), MESHES)
def test_any_mesh_saves(
    tmp_path: Path,
    folder: Path,
    model: DecoderLM,
    world: int,
    zero: int,
    degrees: dict[str, Any],
) -> None:
    saved = tmp_path / "saved"
    run_on_ranks(world, meshes.save, saved, folder, zero, degrees, 200_000)
    assert_same(read(saved), by_hand.published(model))
    assert read_config(saved) == by_hand.CONFIG
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(by_hand.published(model))
    sizes = [file.stat().st_size for file in saved.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    # Below what was asked, but for a header, and files of one tensor that is larger.
    largest = max(tensor.nbytes for tensor in by_hand.published(model).values())
    assert max(sizes) < max(largest, 200_000) + 5_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize("slab_bytes", [1, 1000, 2**27])
def test_slabs_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab_bytes: int
) -> None:
    small = dataclasses.replace(by_hand.CONFIG, vocab_size=3, dim=8, dense_hidden=5, head_dim=2)
    model = by_hand.model(config=dataclasses.replace(small, expert_hidden=5))
    monkeypatch.setattr("expertmesh.convert.published.SLAB_BYTES", slab_bytes)
    save_published(model, tmp_path / "saved")
    assert_same(read(tmp_path / "saved"), by_hand.published(model))


def test_a_small_model_is_one_file_without_an_index(tmp_path: Path, model: DecoderLM) -> None:
    save_published(model, tmp_path / "saved", dtype=torch.bfloat16)
    names = ["config.json", "manifest.json", "model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == names
    expected = {name: t.bfloat16() for name, t in by_hand.published(model).items()}
    assert_same(read(tmp_path / "saved"), expected)


def test_parameters_of_several_dtypes(tmp_path: Path) -> None:
    model = by_hand.model().to(torch.bfloat16)
    model.get_submodule("blocks.0.attention.q").float()
    model.norm.double()
    save_published(model, tmp_path / "saved", shard_bytes=100_000)
    assert_same(read(tmp_path / "saved"), by_hand.published(model))
    assert "torch_dtype" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    offsets = [
        (entry["data_offsets"][0], {"F64": 8, "F32": 4, "BF16": 2}[entry["dtype"]])
        for file in (tmp_path / "saved").glob("*.safetensors")
        for name, entry in header(file).items()
        if name != "__metadata__"
    ]
    assert all(offset % size == 0 for offset, size in offsets)


def header(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def test_a_folder_written_before_is_replaced(tmp_path: Path, model: DecoderLM) -> None:
    for seed in (1, 0):
        save_published(by_hand.model(seed), tmp_path / "saved")
    assert_same(read(tmp_path / "saved"), by_hand.published(model))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_other_folders_are_left_alone(tmp_path: Path, model: DecoderLM) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files; give the path of a new folder"):
        save_published(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("manifest", ['{"name": "my app"}', '{"files": {}}', "", "[]"])
def test_the_manifest_of_another_program_does_not_make_a_folder_ours(
    tmp_path: Path, model: DecoderLM, manifest: str
) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "precious").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files; give the path of a new folder"):
        save_published(model, tmp_path)
    assert (tmp_path / "precious").read_text() == "years of work"


def test_the_folder_may_be_a_link_or_the_current_one(
    tmp_path: Path, model: DecoderLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("disk/saved", "here"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "saved")
    save_published(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(read(tmp_path / "disk" / "saved"), by_hand.published(model))
    monkeypatch.chdir(tmp_path / "here")
    save_published(model, ".")
    assert_same(read(tmp_path / "here"), by_hand.published(model))
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "here", "link"}


def test_a_tokenizer_is_copied(tmp_path: Path, model: DecoderLM) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(UserError, match=r"has no tokenizer; expected one of spiece.model"):
        save_published(model, tmp_path / "saved", tokenizer=source)
    for name in ("spiece.model", "tokenizer_config.json", "notes.txt"):
        (source / name).write_text(name)
    save_published(model, tmp_path / "saved", tokenizer=source)
    assert (tmp_path / "saved" / "spiece.model").read_text() == "spiece.model"
    assert not (tmp_path / "saved" / "notes.txt").exists()


@pytest.mark.parametrize("names", [["encoder.json", "vocab.bpe"], ["mistral.model"]])
def test_every_folder_that_training_reads_is_copied(
    tmp_path: Path, model: DecoderLM, names: list[str]
) -> None:
    (tmp_path / "from").mkdir()
    for name in names:
        (tmp_path / "from" / name).write_text(name)
    save_published(model, tmp_path / "saved", tokenizer=tmp_path / "from")
    assert [(tmp_path / "saved" / name).read_text() for name in names] == names


def test_a_numbered_vocabulary_is_found_beside_the_model(tmp_path: Path, model: DecoderLM) -> None:
    (tmp_path / "tokenizer.model.v1").write_text("pieces")
    save_published(model, tmp_path / "saved", tokenizer=tmp_path / "tokenizer.model.v1")
    assert (tmp_path / "saved" / "tokenizer.model").read_text() == "pieces"


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, folder: Path) -> None:
    answers = run_on_ranks(2, meshes.disk_full_on_one, tmp_path / "saved", folder)
    assert len(set(answers)) == 1
    assert "could not save the model" in answers[0]
    assert "rank 1: No space left on device" in answers[0]
    assert list(tmp_path.iterdir()) == []


def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor missing, one too many, one of another shape."""
    tensors = dict(tensors)
    del tensors["model.layers.0.input_layernorm.weight"]
    tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(64)
    tensors["lm_head.weight"] = torch.zeros(41, 64)
    return tensors


FAULTS = (
    "does not fit the model; missing: model.layers.0.input_layernorm.weight; unexpected: "
    "model.layers.9.input_layernorm.weight; misshapen: lm_head.weight (expected [40, 64], got "
    "[41, 64])"
)


def test_a_folder_that_does_not_fit_is_named_whole_and_nothing_is_loaded(
    tmp_path: Path, model: DecoderLM
) -> None:
    path = write(tmp_path / "model", changed(by_hand.published(model)))
    loaded = by_hand.model(seed=1)
    with pytest.raises(UserError) as caught:
        load_published(loaded, path)
    assert str(caught.value) == f"{path} {FAULTS}"
    assert_same(loaded.state_dict(), by_hand.model(seed=1).state_dict())


def test_quantized_weights_are_refused(tmp_path: Path, model: DecoderLM) -> None:
    tensors = by_hand.published(model)
    name = "model.layers.1.mlp.experts.wo"
    path = write(tmp_path / "model", tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(UserError, match=rf"holds torch.int8 in {name}; expected floating point"):
        load_published(model, path)


def test_all_ranks_hear_what_does_not_fit(folder: Path) -> None:
    answers = run_on_ranks(2, meshes.load_into_another, folder, {"ep": 2})
    assert len(set(answers)) == 1
    assert "misshapen: model.layers.{0,2}.mlp.gate_proj.weight, model.layers.{1,3}." in answers[0]
    assert (
        "model.layers.{1,3}.mlp.experts.wo (expected [8, 96, 64], got [8, 128, 64])" in answers[0]
    )


def test_all_ranks_hear_that_one_does_not_find_the_folder(tmp_path: Path, folder: Path) -> None:
    one, other = run_on_ranks(2, meshes.load_where_one_finds_nothing, folder, tmp_path)
    assert one == other == f"rank 1: {tmp_path} has neither " + one.partition(" neither ")[2]
    one, other = run_on_ranks(2, meshes.save_where_one_has_no_tokenizer, folder, tmp_path)
    assert one == other
    assert "rank 1: " in one
    assert "has no tokenizer" in one
    assert list(tmp_path.iterdir()) == [tmp_path / "tokenizer"]


def test_a_model_that_was_changed_is_refused(folder: Path) -> None:
    model = by_hand.model()
    model.blocks[0].register_parameter("extra", nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match=r"no place for blocks.0.extra"):
        load_published(model, folder)


def remove_a_file(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def cut_a_file(folder: Path) -> None:
    file = next(folder.glob("model-00002*"))
    file.write_bytes(file.read_bytes()[:-8])


def leave_an_empty_folder(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def spoil_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def name_too_much(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.gone"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_a_file, r"model-00002-of-00003.safetensors is missing"),
        (cut_a_file, r"model-00002-of-00003.safetensors cannot be read"),
        (leave_an_empty_folder, r"has neither model.safetensors nor model.safetensors.index"),
        (spoil_the_index, r"index.json is no index of tensors"),
        (name_too_much, r"names tensors that are not there: \['model.gone'\]"),
    ],
)
def test_spoiled_folders(
    tmp_path: Path, model: DecoderLM, spoil: Callable[[Path], None], message: str
) -> None:
    path = write(tmp_path / "model", by_hand.published(model))
    spoil(path)
    with pytest.raises(UserError, match=message):
        load_published(model, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config.json is no JSON"),
        ("[]", r"config.json is no table of keys"),
        ('{"model_type": "gpt2"}', r"is of no known family of models \(openmoe"),
        ('{"model_type": "openmoe"}', r"config.json: the configuration has no vocab_size, hidden"),
    ],
)
def test_spoiled_configurations(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)
    with pytest.raises(UserError, match=r"nowhere is missing"):
        read_config(tmp_path / "nowhere")


def test_layouts_are_of_the_models_size(model: DecoderLM) -> None:
    assert layout(model.config).num_elements == model.config.num_params
