"""Keys that a ``config.json`` leaves out mean what transformers' class of the family takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertmesh.convert.families import FAMILIES
from expertmesh.convert.published import load_published, read_config
from expertmesh.errors import UserError
from expertmesh.models import DecoderLM, decoder_preset
from expertmesh.testing import assert_close
from tests.convert.test_families import OWN, SIZES, logits, theirs

transformers = pytest.importorskip("transformers")

CLASSES = {"mixtral": "MixtralConfig", "olmoe": "OlmoeConfig", "qwen3-moe": "Qwen3MoeConfig"}
# Without these there is no model.
SAID = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_left_out_is_as_in_transformers(name: str) -> None:
    usual = getattr(transformers, CLASSES[name])(**SAID)
    ours = FAMILIES[name].decoder_config(SAID)
    assert ours.rope_theta == usual.rope_parameters["rope_theta"]
    assert ours.norm_eps == usual.rms_norm_eps
    assert ours.max_seq_len == usual.max_position_embeddings
    assert ours.kv_heads == usual.num_key_value_heads
    assert ours.num_experts == getattr(usual, "num_experts", None) or usual.num_local_experts
    assert ours.experts_per_token == usual.num_experts_per_tok
    assert ours.tied_embeddings == usual.tie_word_embeddings
    assert ours.init_std == usual.initializer_range
    router = ours.build_router()
    assert router.losses[0].coef == usual.router_aux_loss_coef
    # Mixtral, which has no such key, makes weights of the chosen scores alone.
    chosen = getattr(usual, "norm_topk_prob", True)
    assert router.renormalize == ("chosen" if chosen else "no")


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen3-moe"])
def test_a_folder_with_keys_left_out_computes_the_same(tmp_path: Path, case: str) -> None:
    theirs(case).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    keys = json.loads(file.read_text())
    gone = {"rms_norm_eps", "rope_parameters", "rope_theta", "norm_topk_prob", "hidden_act"}
    gone |= {"max_position_embeddings", "attention_bias", "sliding_window", "decoder_sparse_step"}
    file.write_text(json.dumps({key: keys[key] for key in keys.keys() - gone}))
    ours = DecoderLM(read_config(tmp_path), seed=3).eval()
    load_published(ours, tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close("logits", logits(ours), logits(expected))


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"])
def test_one_of_two_places_for_theta_is_not_edited_in_vain(preset: str) -> None:
    family = next(family for family in FAMILIES.values() if preset in family.presets)
    keys = family.published_config(decoder_preset(preset))
    with pytest.raises(UserError, match=r"rope_theta = 7.0 and rope_parameters.rope_theta = "):
        family.decoder_config(keys | {"rope_theta": 7.0})
    with pytest.raises(UserError, match=r"and rope_parameters.rope_theta = 7.0 disagree"):
        family.decoder_config(keys | {"rope_parameters": {"rope_theta": 7.0}})


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("mixtral", {"attention_dropout": 0.1}, r"attention_dropout = 0.1 \(expected 0.0\)"),
        ("olmoe", {"attention_dropout": 0.1}, r"attention_dropout = 0.1 \(expected 0.0\)"),
        ("qwen3-moe", {"attention_dropout": 0.1}, r"attention_dropout = 0.1 \(expected 0.0\)"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise = 0.1 \(expected 0.0\)"),
        (
            "mixtral",
            {"sliding_window": 4096, "max_position_embeddings": None},
            r"sliding_window = 4096 below max_position_embeddings = 131072",
        ),
    ],
)
def test_what_only_training_or_a_default_would_show_is_refused(
    name: str, keys: dict[str, Any], message: str
) -> None:
    content = {key: value for key, value in (SIZES | OWN[name] | keys).items() if value is not None}
    with pytest.raises(UserError, match=message):
        FAMILIES[name].decoder_config(content)
