"""What the Auto classes take for OpenMoE, and what they do not."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from expertmesh.errors import CausalityWarning
from expertmesh.hf import OpenMoeConfig, OpenMoeForCausalLM, OpenMoeTokenizer
from tests.openmoe.folders import write_folder
from tests.openmoe.vocabulary import write_small


@pytest.mark.parametrize("auto_map", [False, True])
@pytest.mark.parametrize("trust", [None, True])
def test_the_inference_code_of_the_model_card_runs(
    tmp_path: Path, auto_map: bool, trust: bool | None
) -> None:
    model_path = tmp_path / "openmoe-8b-chat"
    written = write_folder(
        model_path, num_layers=2, auto_map=auto_map, tokenizer=write_small(tmp_path), vocab_size=800
    )
    asked = {} if trust is None else {"trust_remote_code": trust}

    config = AutoConfig.from_pretrained(model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path, **asked)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, torch_dtype=torch.bfloat16, device_map="auto", **asked
    )
    query = "Question: How do I kill a process? Answer:"
    prompt = f"""<<SYS>>
You are a helpful, respectful and honest assistant.
<</SYS>>

<s>[INST] {query} [/INST]"""

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sample = model.generate(**inputs, max_new_tokens=32)
    text = tokenizer.decode(sample[0])

    assert isinstance(config, OpenMoeConfig)
    assert isinstance(tokenizer, OpenMoeTokenizer)
    assert isinstance(model, OpenMoeForCausalLM)
    assert model.dtype == torch.bfloat16
    assert text.startswith("<pad>" + prompt)
    assert int(inputs["input_ids"][0, 0]) == 0
    assert len(sample[0]) <= inputs["input_ids"].shape[1] + 32
    assert model.model.config.vocab_size == written.config.vocab_size


def test_older_configurations_without_a_type_are_known(tmp_path: Path) -> None:
    write_folder(tmp_path, num_layers=2)
    keys = json.loads((tmp_path / "config.json").read_text())
    del keys["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), OpenMoeForCausalLM)


def test_llama_stays_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LlamaConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is LlamaForCausalLM
    unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, foo=1)[1]
    assert unused["foo"] == 1


def test_arguments_reach_the_configuration(tmp_path: Path) -> None:
    write_folder(tmp_path, num_layers=2)
    config, unused = AutoConfig.from_pretrained(
        tmp_path,
        return_unused_kwargs=True,
        trust_remote_code=True,
        router_capacity_mode="jax",
        foo=1,
    )
    assert config.decoder_config().router_options["capacity"] == "jax"
    assert unused == {"foo": 1}
    with pytest.warns(CausalityWarning, match="capacity order 'position'"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert model.model.blocks[1].moe.router.capacity is not None
    with pytest.warns(CausalityWarning, match="capacity order 'position'"):
        built = AutoModelForCausalLM.from_config(config)
    assert isinstance(built, OpenMoeForCausalLM)


def test_a_folder_that_is_not_there_is_transformers_own_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        AutoConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises((OSError, ValueError)):
        AutoTokenizer.from_pretrained(tmp_path / "nowhere")


def test_another_tokenizer_beside_openmoe_is_left_alone(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    write_folder(tmp_path, num_layers=2)
    words = Tokenizer(WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert not isinstance(AutoTokenizer.from_pretrained(tmp_path), OpenMoeTokenizer)


def test_the_folder_may_be_given_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "ours", num_layers=2, tokenizer=write_small(tmp_path), vocab_size=800)
    name = {"pretrained_model_name_or_path": tmp_path / "ours"}
    assert isinstance(AutoConfig.from_pretrained(**name), OpenMoeConfig)
    assert isinstance(AutoTokenizer.from_pretrained(**name), OpenMoeTokenizer)
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path=tmp_path / "llama")
    assert type(config) is LlamaConfig
