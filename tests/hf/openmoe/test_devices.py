"""Device maps: which names they may use, and that weights on disk give the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.convert.openmoe import layout
from expertmesh.errors import UserError
from expertmesh.hf import OpenMoeForCausalLM
from expertmesh.hf.openmoe.devices import our_device_map
from expertmesh.models import decoder_preset
from tests.hf.openmoe.conftest import Folder

PUBLISHED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.1.mlp.experts": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def four_layers() -> Any:
    return layout(decoder_preset("openmoe-test", vocab_size=512))


def test_published_names_become_ours() -> None:
    device_map = {"": "cpu", "model.layers.0": 0, "model.layers.1": 1, "lm_head": "disk"}
    assert our_device_map(device_map, four_layers()) == {
        "model.embedding": "cpu",
        "model.blocks.0": 0,
        "model.blocks.1": 1,
        "model.blocks.2": "cpu",
        "model.blocks.3": "cpu",
        "model.norm": "cpu",
        "model.head": "disk",
    }


def test_longer_names_go_first_and_all_of_one_device_is_one_entry() -> None:
    device_map = {"model": 0, "lm_head": 1, "model.layers.1.mlp.experts": "cpu"}
    assert our_device_map(device_map, four_layers()) == {
        "model.embedding": 0,
        "model.blocks.0": 0,
        "model.blocks.1.attention_norm": 0,
        "model.blocks.1.attention": 0,
        "model.blocks.1.moe_norm": 0,
        "model.blocks.1.moe.router": 0,
        "model.blocks.1.moe.experts": "cpu",
        "model.blocks.1.extra_norm": 0,
        "model.blocks.1.extra_mlp": 0,
        "model.blocks.2": 0,
        "model.blocks.3": 0,
        "model.norm": 0,
        "model.head": 1,
    }
    assert our_device_map({"model.layers": 0, "": 1}, four_layers())["model.blocks"] == 0
    assert our_device_map({"": "cpu"}, four_layers()) == {"": "cpu"}


def test_our_own_names_work_too() -> None:
    mixed = {"model.blocks.0": 1, "model.layers.1": 1, "": 0}
    assert our_device_map(mixed, four_layers()) == our_device_map(
        {"model.layers.0": 1, "model.blocks.1": 1, "": 0}, four_layers()
    )


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": 0, "model.layer.1": 1}, r"\['model.layer.1'\]; .*; did you mean 'model.layers.1'\?$"),
        ({"": 0, "model.layers.4": 1}, r"\['model.layers.4'\]"),
        ({"model.layers": 0}, "says nothing of model.embed_tokens.weight"),
        ({"": 0, "model.layers.1.mlp.experts.wi_up": 1}, "one parameter here.* on one device"),
    ],
)
def test_maps_that_do_not_fit_are_refused(device_map: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        our_device_map(device_map, four_layers())


def test_weights_on_disk_give_the_same_numbers(
    folder: Folder, tokens: Tensor, tmp_path: Path
) -> None:
    loaded = OpenMoeForCausalLM.from_pretrained(
        folder.path, device_map=PUBLISHED, offload_folder=tmp_path / "offload"
    )
    assert loaded.hf_device_map["model.blocks.0"] == "disk"
    assert loaded.hf_device_map["model.blocks.1.moe.experts"] == "disk"
    assert loaded.model.blocks[0].mlp.up.weight.is_meta
    assert loaded.model.blocks[1].moe.experts.gates_up.is_meta
    assert not loaded.model.blocks[1].attention.q.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, folder.model(tokens), rtol=0, atol=1e-11)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    whole = OpenMoeForCausalLM.from_pretrained(folder.path)
    assert torch.equal(loaded.generate(tokens, **options), whole.generate(tokens, **options))


def test_what_is_on_disk_can_be_saved(folder: Folder, tmp_path: Path) -> None:
    loaded = OpenMoeForCausalLM.from_pretrained(
        folder.path, device_map=PUBLISHED, offload_folder=tmp_path / "offload"
    )
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "again")
    again = OpenMoeForCausalLM.from_pretrained(tmp_path / "again")
    for name, value in folder.model.state_dict().items():
        assert torch.equal(again.model.get_parameter(name), value), name


def test_too_little_memory_puts_the_rest_on_disk(
    folder: Folder, tokens: Tensor, tmp_path: Path
) -> None:
    loaded = OpenMoeForCausalLM.from_pretrained(
        folder.path,
        device_map="auto",
        max_memory={"cpu": "3300KB"},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, folder.model(tokens), rtol=0, atol=1e-11)


def test_disk_needs_a_folder(folder: Folder) -> None:
    with pytest.raises(UserError, match="set offload_folder"):
        OpenMoeForCausalLM.from_pretrained(folder.path, device_map=PUBLISHED)
