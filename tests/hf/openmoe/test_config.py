"""The published keys, older ones, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.hf import OpenMoeConfig, OpenMoeForCausalLM
from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from tests.openmoe.folders import OLDER_KEYS, published_keys


def on_meta(config: DecoderConfig) -> DecoderLM:
    with torch.device("meta"):
        return DecoderLM(config)


@pytest.mark.parametrize("size", ["test", "base", "8b", "34b"])
def test_a_shape_comes_back_from_its_keys(size: str, tmp_path: Path) -> None:
    shape = decoder_preset(f"openmoe-{size}")
    OpenMoeConfig.of(shape).save_pretrained(tmp_path)
    loaded = OpenMoeConfig.from_pretrained(tmp_path)
    assert loaded.decoder_config() == shape
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 0)


def test_dropout_inside_experts_comes_back(tmp_path: Path) -> None:
    shape = dataclasses.replace(decoder_preset("openmoe-test"), expert_dropout=0.4)
    OpenMoeConfig.of(shape).save_pretrained(tmp_path)
    assert OpenMoeConfig.from_pretrained(tmp_path).decoder_config() == shape


def test_published_keys_are_read_and_kept(tmp_path: Path) -> None:
    shape = decoder_preset("openmoe-base")
    keys = published_keys(on_meta(shape), auto_map=True)
    (tmp_path / "config.json").write_text(json.dumps(keys))
    config = OpenMoeConfig.from_pretrained(tmp_path)
    assert dataclasses.replace(config.decoder_config(), init_std=shape.init_std) == shape
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    gone = {"auto_map", "rope_scaling", "torch_dtype", "use_cache"}
    expected = {**keys, "model_type": "openmoe"}
    kept = keys.keys() - gone - {"transformers_version"}
    assert {key: written[key] for key in kept} == {key: expected[key] for key in kept}
    assert written["dtype"] == "float32"
    assert "auto_map" not in written


def test_older_keys_mean_the_same() -> None:
    config = OpenMoeConfig(**OLDER_KEYS)
    shape = decoder_preset("openmoe-8b")
    assert config.decoder_config() == shape
    assert config.num_key_value_heads == 24
    assert config.max_position_embeddings == 2048


@pytest.mark.parametrize(
    ("mode", "training", "slots"),
    # 4096 tokens, E = 32 and k = 2: what each expert takes.
    [("jax", True, 160), ("jax", False, 256), ("pytorch", True, 320), ("pytorch", False, 512)],
)
def test_capacity_modes(mode: str, training: bool, slots: int) -> None:
    config = OpenMoeConfig(**OLDER_KEYS, router_capacity_mode=mode)
    with torch.device("meta"):
        router = config.decoder_config().build_router()
    assert router.capacity.slots(4096, 32, 2, training=training) == slots


def test_routing_is_dropless_by_default() -> None:
    with torch.device("meta"):
        assert OpenMoeConfig(**OLDER_KEYS).decoder_config().build_router().capacity is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"router_capacity_mode": "jx"}, "router_capacity_mode must be one of .* 'jx'; did you"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"gated": False}, "mlp_gated"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"head_dim": None}, "head_dim"),
    ],
)
def test_what_the_model_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OpenMoeConfig(**{**OLDER_KEYS, **keys})


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(UserError, match="is not OpenMoE's"):
        OpenMoeForCausalLM.from_pretrained(tmp_path)
