"""Folders that transformers wrote, into the decoder and back."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.cli.convert import main
from expertmesh.convert.families import FAMILIES
from expertmesh.convert.published import (
    family_of_model,
    load_published,
    read_config,
    save_published,
)
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from expertmesh.testing import assert_close

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "pad_token_id": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "rope_theta": 500.0},
    "olmoe": {"num_experts": 4},
    "olmoe-normalised": {"num_experts": 4, "norm_topk_prob": True},
    "olmoe-tied": {"num_experts": 4, "tie_word_embeddings": True},
    "qwen3-moe": {
        "num_experts": 4,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
    "qwen3-moe-mixed": {
        "num_experts": 4,
        "moe_intermediate_size": 12,
        "head_dim": 8,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
    },
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 18, 28, 18, 28, 45, 49]])
PRESETS = ["mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b"]


def theirs(case: str) -> Any:
    names = {"mixtral": "Mixtral", "olmoe": "Olmoe", "qwen3": "Qwen3Moe"}
    name = names[case.split("-")[0]]
    config = getattr(transformers, f"{name}Config")(**SIZES | OWN[case])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1, 0.3)
    return model


def family_name(case: str) -> str:
    return next(name for name in FAMILIES if case.startswith(name))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer = model(TOKENS)
    return getattr(answer, "logits", answer)


@pytest.mark.parametrize("original", [True, False], ids=["published", "stacked"])
@pytest.mark.parametrize("case", OWN)
def test_a_folder_of_transformers_computes_the_same(
    tmp_path: Path, case: str, original: bool
) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path, save_original_format=original)
    ours = DecoderLM(read_config(tmp_path), seed=3).eval()
    load_published(ours, tmp_path)
    assert_close("logits", logits(ours), logits(model))
    assert family_of_model(ours.config).name == family_name(case)


@pytest.mark.parametrize("case", OWN)
def test_what_is_saved_is_what_transformers_saves(tmp_path: Path, case: str) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = DecoderLM(read_config(tmp_path / "theirs"), seed=3)
    load_published(ours, tmp_path / "theirs")
    save_published(ours, tmp_path / "ours")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert read_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen3-moe-mixed"])
def test_the_command_turns_stacked_into_single_and_back(tmp_path: Path, case: str) -> None:
    model = theirs(case)
    for name, original in (("published", True), ("stacked", False)):
        model.save_pretrained(tmp_path / name, save_original_format=original)
    family = family_name(case)
    for source, to in (("published", "stacked"), ("stacked", "published")):
        words = [family, str(tmp_path / source), str(tmp_path / f"to-{to}"), "--to", to]
        assert main(words) == 0
        found = load_file(tmp_path / f"to-{to}" / "model.safetensors")
        expected = load_file(tmp_path / to / "model.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_made_of_two_dtypes_loses_no_value_of_either(tmp_path: Path) -> None:
    theirs("mixtral").save_pretrained(tmp_path / "from")
    tensors = load_file(tmp_path / "from" / "model.safetensors")
    name = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"
    for layer, expert in itertools.product(range(3), range(4)):
        tensors[name.format(layer, expert)] = tensors[name.format(layer, expert)].bfloat16()
    save_file(tensors, tmp_path / "from" / "model.safetensors")
    assert main(["mixtral", str(tmp_path / "from"), str(tmp_path / "to"), "--to", "stacked"]) == 0
    assert main(["mixtral", str(tmp_path / "to"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    for key, values in tensors.items():
        assert torch.equal(back[key], values.to(back[key].dtype)), key
        assert back[key].dtype == torch.float32


@pytest.mark.parametrize("preset", PRESETS)
def test_published_sizes(preset: str) -> None:
    config = decoder_preset(preset)
    family = family_of_model(config)
    with torch.device("meta"):
        model = DecoderLM(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for kind in family.kinds:
        layout = family.layout(config, kind)
        assert dict(layout.our_shapes) == shapes
        assert layout.num_elements == config.num_params
    assert family.presets == (preset,)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_there_and_back(preset: str) -> None:
    config = decoder_preset(preset)
    family = family_of_model(config)
    assert family.decoder_config(family.published_config(config)) == config


@pytest.mark.parametrize("rule", ["no", "chosen", "kept"])
@pytest.mark.parametrize("preset", PRESETS)
def test_how_weights_are_normalised_is_kept(preset: str, rule: str) -> None:
    options = {"renormalize": rule, "capacity": {"factor": 1.5}}
    config = dataclasses.replace(decoder_preset(preset), router_options=options)
    family = family_of_model(config)
    read = family.decoder_config(json.loads(json.dumps(family.published_config(config))))
    assert read.build_router().renormalize == rule


def test_options_without_a_key_are_kept() -> None:
    options = {"balance_coef": 0.02, "z_coef": 0.001}
    config = dataclasses.replace(decoder_preset("olmoe-1b-7b"), router_options=options, dropout=0.1)
    family = FAMILIES["olmoe"]
    keys = family.published_config(config)
    assert keys["router_aux_loss_coef"] == 0.02
    assert keys["router_options"] == {"z_coef": 0.001}
    assert family.decoder_config(keys) == config


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen3-moe"])
def test_dropout_goes_there_and_back(tmp_path: Path, case: str) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    read = read_config(tmp_path / "theirs")
    assert (read.dropout, read.expert_dropout) == (0.0, 0.0)
    ours = DecoderLM(dataclasses.replace(read, dropout=0.1, expert_dropout=0.4), seed=3)
    load_published(ours, tmp_path / "theirs")
    save_published(ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours") == ours.config
    # transformers, which has no such dropout, reads the folder as it does any other.
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == ours.config


@pytest.mark.parametrize("preset", [*PRESETS, "openmoe-8b"])
def test_without_dropout_in_experts_no_key_speaks_of_it(preset: str) -> None:
    config = decoder_preset(preset)
    assert "expert_dropout_rate" not in family_of_model(config).published_config(config)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "mixtral",
            {"sliding_window": 8},
            r"sliding_window = 8 below max_position_emb",
        ),
        ("mixtral", {"hidden_act": "gelu"}, r"hidden_act = 'gelu' \(expected 'silu'\)"),
        ("mixtral", {"hidden_size": None}, r"has no hidden_size; expected mixtral's keys"),
        ("mixtral", {"intermediate_size": None}, r"no intermediate_size; expected mixtral's"),
        ("qwen3-moe", {"moe_intermediate_size": None}, r"no moe_intermediate_size; expected qw"),
        ("olmoe", {"clip_qkv": 8.0}, r"clip_qkv = 8.0 \(expected None\)"),
        ("olmoe", {"rope_parameters": {"rope_type": "yarn"}}, r"rope_type = 'yarn'"),
        ("qwen3-moe", {"use_sliding_window": True}, r"use_sliding_window = True"),
        ("qwen3-moe", {"mlp_only_layers": [1]}, r"not with mlp_only_layers = \[1\]"),
        ("mixtral", {"expert_dropout_rate": 1.5}, r"config.json: expert_dropout must be .*got 1.5"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    tmp_path: Path, name: str, keys: dict[str, Any], message: str
) -> None:
    model_type = {"qwen3-moe": "qwen3_moe"}.get(name, name)
    content = SIZES | OWN[name] | {"model_type": model_type} | keys
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (decoder_preset("deepseek-v2-lite"), r"mixtral has no model with attention = 'mla'"),
        (
            dataclasses.replace(decoder_preset("mixtral-8x7b"), router="switch"),
            r"mixtral has no model with router = 'switch' \(expected 'mixtral'\)",
        ),
        (
            dataclasses.replace(decoder_preset("mixtral-8x7b"), expert_form="scaled_input"),
            r"mixtral has no model with expert_form = 'scaled_input' \(expected 'auto'\)",
        ),
        (
            dataclasses.replace(decoder_preset("olmoe-1b-7b"), head_dim=64),
            r"olmoe has no model with head_dim = 64 \(expected 128: dim / num_heads\)",
        ),
        (
            dataclasses.replace(decoder_preset("openmoe-test"), expert_form="scaled_input"),
            r"cannot say expert_form = 'scaled_input' \(expected 'auto'\)",
        ),
    ],
)
def test_a_model_of_no_family(config: DecoderConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        family_of_model(config)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"published, stacked, got 't5x'"):
        FAMILIES["mixtral"].layout(decoder_preset("mixtral-8x7b"), "t5x")
