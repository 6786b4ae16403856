"""Published files in and out: nothing lost, nothing taken that does not fit."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertmesh.convert.openmoe import layout
from expertmesh.errors import CausalityWarning, UserError
from expertmesh.hf import OpenMoeConfig, OpenMoeForCausalLM, as_openmoe
from expertmesh.hf.openmoe.weights import PREFIX, Regroup, conversions
from expertmesh.models import DecoderLM, decoder_preset
from expertmesh.routing.presets import OPENMOE_CAPACITIES
from tests.hf.openmoe.conftest import Folder
from tests.openmoe.folders import published_tensors, write_folder


def assert_same(loaded: OpenMoeForCausalLM, model: DecoderLM) -> None:
    values = model.state_dict()
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, values.pop(name), rtol=0, atol=0)
    assert not values


@pytest.mark.parametrize("num_shards", [0, 1, 3], ids=["pickle", "single", "sharded"])
def test_values_are_those_of_the_files(tmp_path: Path, tokens: Tensor, num_shards: int) -> None:
    model = write_folder(tmp_path, num_shards=num_shards, dtype=torch.float64)
    loaded = OpenMoeForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert loaded.dtype == torch.float64
    assert not loaded.training
    torch.testing.assert_close(loaded(tokens).logits, model(tokens), rtol=0, atol=1e-11)


@pytest.mark.parametrize("max_shard_size", ["1GB", "150KB"])
def test_what_is_saved_is_the_published_layout(
    folder: Folder, tmp_path: Path, max_shard_size: str
) -> None:
    loaded = OpenMoeForCausalLM.from_pretrained(folder.path)
    loaded.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_size != "1GB")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = published_tensors(folder.model)
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name
    assert_same(OpenMoeForCausalLM.from_pretrained(tmp_path), folder.model)


def test_a_decoder_built_here_is_saved_as_published(folder: Folder, tmp_path: Path) -> None:
    as_openmoe(folder.model).save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), folder.model)


@pytest.mark.parametrize("size", ["base", "8b", "34b"])
def test_every_published_tensor_has_its_place(size: str) -> None:
    config = decoder_preset(f"openmoe-{size}")
    files = layout(config)
    with torch.device("meta"):
        adapter = OpenMoeForCausalLM(OpenMoeConfig.of(config))
    ours = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    made: set[str] = set()
    for conversion in conversions(files):
        made |= set(conversion.target_patterns)
        if operations := getattr(conversion, "operations", None):
            (regroup,) = operations
            assert isinstance(regroup, Regroup)
            sources = {
                pattern: [torch.empty(files.their_shapes[name], device="meta")]
                for pattern, name in zip(
                    conversion.source_patterns, regroup.layout.of_theirs, strict=True
                )
            }
            got = regroup.convert(sources, conversion.source_patterns, conversion.target_patterns)
            for name, tensor in got.items():
                assert tuple(tensor.shape) == ours[name]
    assert made == set(ours)
    assert {PREFIX + name: shape for name, shape in files.our_shapes.items()} == ours


def test_every_fault_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    write_folder(tmp_path, num_layers=2)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.wi_up"]
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.bias"] = torch.zeros(3)
    tensors["lm_head.weight"] = torch.zeros(500, 64)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        OpenMoeForCausalLM.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for part in (
        "missing: model.norm.weight, model.layers.1.mlp.experts.wi_up",
        "unexpected: model.layers.0.mlp.bias",
        "lm_head.weight (expected [512, 64], got [500, 64])",
    ):
        assert part in message, message


def test_a_wrong_vocabulary_size_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, num_layers=2, keys={"vocab_size": 600})
    with pytest.raises(
        UserError, match=r"embed_tokens.*lm_head.*\(expected \[600, 64\], got \[512, 64\]\)"
    ):
        OpenMoeForCausalLM.from_pretrained(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, num_layers=2, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match=r"model-00002-of-00002\.safetensors"):
        OpenMoeForCausalLM.from_pretrained(tmp_path)


def test_folders_of_single_experts_are_pointed_at_the_converter(tmp_path: Path) -> None:
    write_folder(tmp_path, num_layers=2)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    stacked = tensors.pop("model.layers.1.mlp.experts.wo")
    for expert, matrix in enumerate(stacked):
        tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = matrix.T.contiguous()
        tensors[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"] = torch.zeros(1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="expertmesh convert openmoe"):
        OpenMoeForCausalLM.from_pretrained(tmp_path)


def test_float16_warns_with_the_reason(folder: Folder) -> None:
    with pytest.warns(UserWarning, match="float16 is not advised for OpenMoE: .*bfloat16"):
        OpenMoeForCausalLM.from_pretrained(folder.path, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = OpenMoeForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16


def test_the_capacity_mode_is_an_argument(folder: Folder) -> None:
    with pytest.warns(CausalityWarning, match="capacity order 'position'"):
        loaded = OpenMoeForCausalLM.from_pretrained(folder.path, router_capacity_mode="jax")
    capacity = loaded.model.blocks[1].moe.router.capacity
    assert capacity == OPENMOE_CAPACITIES["jax"]


def test_the_configuration_says_what_was_saved(folder: Folder, tmp_path: Path) -> None:
    as_openmoe(folder.model).save_pretrained(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    assert keys["architectures"] == ["OpenMoeForCausalLM"]
    assert keys["model_type"] == "openmoe"
    assert (keys["num_experts"], keys["moe_layer_interval"], keys["router_topk"]) == (8, 2, 2)
