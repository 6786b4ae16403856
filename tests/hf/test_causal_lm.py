"""The adapter: generation and saving are transformers', the numbers are the decoder's."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache
from transformers.generation import BaseStreamer

from expertmesh.errors import UserError
from expertmesh.hf import (
    ExpertmeshConfig,
    ExpertmeshForCausalLM,
    OpenMoeConfig,
    as_transformers,
)
from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from tests.models.conftest import GROUPED, SHAPES

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["grouped", "learned", "latent"])
def decoder(request: pytest.FixtureRequest) -> DecoderLM:
    """A float64 decoder in evaluation."""
    return DecoderLM(DecoderConfig(**SHAPES[request.param]), seed=1).double().eval()


@pytest.fixture
def prompt() -> Tensor:
    """``(2, 4)`` ids."""
    return torch.randint(1, 31, (2, 4), generator=torch.Generator().manual_seed(0))


def greedy(decoder: DecoderLM, tokens: Tensor, count: int) -> Tensor:
    """The definition: the whole sequence each time, without a cache."""
    for _ in range(count):
        tokens = torch.cat([tokens, decoder(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_argmax(decoder: DecoderLM, prompt: Tensor, use_cache: bool) -> None:
    model = as_transformers(decoder)
    generated = model.generate(prompt, use_cache=use_cache, **GREEDY)
    assert torch.equal(generated, greedy(decoder, prompt, 6))


def test_left_padding_changes_no_token(decoder: DecoderLM, prompt: Tensor) -> None:
    model = as_transformers(decoder)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), prompt], dim=1)
    padded[0, 2] = 9
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    mask[1, :3] = 0
    generated = model.generate(padded, attention_mask=mask, **GREEDY)
    assert torch.equal(generated[0, 2:], greedy(decoder, padded[:1, 2:], 6)[0])
    assert torch.equal(generated[1, 3:], greedy(decoder, prompt[1:], 6)[0])


def test_sampling_follows_the_seed(decoder: DecoderLM, prompt: Tensor) -> None:
    model = as_transformers(decoder)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "pad_token_id": 0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, top_p=0.95, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_beams_score_no_worse_than_greedy(decoder: DecoderLM, prompt: Tensor) -> None:
    def score(tokens: Tensor) -> Tensor:
        logp = decoder(tokens).log_softmax(dim=-1)[:, 3:-1]
        return logp.gather(2, tokens[:, 4:, None]).sum(dim=(1, 2))

    model = as_transformers(decoder)
    # With a beam for each of the 31 first tokens, two steps are searched in full.
    options = {**GREEDY, "max_new_tokens": 2}
    beams = model.generate(prompt, num_beams=31, **options)
    assert (score(beams) >= score(greedy(decoder, prompt, 2)) - 1e-9).all()
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    every = torch.cat([prompt[:1].expand(len(pairs), -1), pairs], dim=1)
    torch.testing.assert_close(score(beams)[0], score(every).max())


def test_streamer_sees_every_token(decoder: DecoderLM, prompt: Tensor) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Collect()
    generated = as_transformers(decoder).generate(prompt[:1], streamer=streamer, **GREEDY)
    assert streamer.seen == generated[0].tolist()
    assert streamer.ended


def test_end_token_stops(decoder: DecoderLM, prompt: Tensor) -> None:
    expected = greedy(decoder, prompt[:1], 6)[0].tolist()
    model = as_transformers(decoder, eos_token_id=expected[5])
    generated = model.generate(prompt[:1], **GREEDY)[0].tolist()
    assert generated == expected[: expected.index(expected[5], 4) + 1]


def test_weights_are_shared(decoder: DecoderLM, prompt: Tensor) -> None:
    model = as_transformers(decoder)
    before = model(prompt).logits
    with torch.no_grad():
        decoder.norm.weight.mul_(2)
    torch.testing.assert_close(model(prompt).logits, 2 * before)
    assert not model.training
    assert as_transformers(decoder.train()).training


def test_only_the_logits_asked_for(decoder: DecoderLM, prompt: Tensor) -> None:
    model = as_transformers(decoder)
    torch.testing.assert_close(
        model(prompt, logits_to_keep=1).logits, decoder(prompt)[:, -1:], rtol=1e-12, atol=1e-12
    )


def test_loss_is_the_mean_over_labels(decoder: DecoderLM, prompt: Tensor) -> None:
    labels = prompt.clone()
    labels[0, 2] = -100
    loss = as_transformers(decoder)(prompt, labels=labels).loss
    expected = torch.nn.functional.cross_entropy(
        decoder(prompt)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("loader", [ExpertmeshForCausalLM, AutoModelForCausalLM])
def test_saved_and_loaded(decoder: DecoderLM, prompt: Tensor, tmp_path: Path, loader: Any) -> None:
    model = as_transformers(decoder, eos_token_id=3)
    model(prompt)
    model.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, ExpertmeshForCausalLM)
    assert loaded.config.decoder_config() == decoder.config
    assert loaded.config.eos_token_id == 3
    saved = decoder.state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, saved.pop(name)), name
    assert saved == {}
    # Not bit for bit: loaded memory may be aligned otherwise, and matrix kernels look at that.
    torch.testing.assert_close(loaded(prompt).logits, model(prompt).logits, rtol=0, atol=1e-12)
    # Counters and the loss scale are not saved: they start anew.
    for block in loaded.model.blocks:
        if hasattr(block, "moe"):
            assert block.moe.loss_scale == 1
            assert block.moe.metrics()["tokens"].value == prompt.numel()


def test_checkpoint_without_a_weight_is_refused(prompt: Tensor, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    as_transformers(DecoderLM(DecoderConfig(**GROUPED))).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.blocks.1.moe.experts.down"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint has no down for a GatedMLPExperts"):
        ExpertmeshForCausalLM.from_pretrained(tmp_path)


def test_four_dimensional_masks_are_refused(prompt: Tensor) -> None:
    model = as_transformers(DecoderLM(DecoderConfig(**GROUPED)))
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(B, P \+ S\)"):
        model(prompt, attention_mask=torch.ones(2, 1, 4, 4))


def test_without_transformers_the_pip_line_comes() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import expertmesh.models\n"
        "try:\n    import expertmesh.hf\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'expertmesh[hf]'" in done.stdout


def test_models_do_not_import_transformers() -> None:
    code = "import sys, expertmesh.models; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_position_ids_are_the_positions(decoder: DecoderLM, prompt: Tensor) -> None:
    positions = torch.tensor([[0, 2, 3, 7]])
    logits = as_transformers(decoder)(prompt, position_ids=positions).logits
    assert torch.equal(logits, decoder(prompt, positions=positions))
    assert not torch.equal(logits, decoder(prompt))


@pytest.mark.parametrize(
    "name", ["output_hidden_states", "output_attentions", "output_router_logits"]
)
def test_what_cannot_be_returned_is_refused(decoder: DecoderLM, prompt: Tensor, name: str) -> None:
    model = as_transformers(decoder)
    with pytest.raises(UserError, match=f"{name} is not supported"):
        model(prompt, **{name: True})
    assert model(prompt, **{name: False}).logits.shape == (2, 4, 31)


def test_embeddings_in_place_of_ids_are_refused(decoder: DecoderLM, prompt: Tensor) -> None:
    embedded = decoder.embedding(prompt)
    with pytest.raises(UserError, match="inputs_embeds is not supported"):
        as_transformers(decoder).generate(inputs_embeds=embedded, **GREEDY)
    with pytest.raises(UserError, match="inputs_embeds is not supported"):
        as_transformers(decoder)(inputs_embeds=embedded)
    with pytest.raises(UserError, match=r"input_ids are missing; give ids of shape \(B, S\)"):
        as_transformers(decoder)(attention_mask=torch.ones(2, 4))


def test_a_cache_of_fixed_length_is_refused(decoder: DecoderLM, prompt: Tensor) -> None:
    """Its slots that hold nothing yet would be attended to."""
    model = as_transformers(decoder)
    with pytest.raises(UserError, match="fixed length is not supported, got a StaticCache"):
        model(prompt, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(UserError, match="leave cache_implementation out"):
        model.generate(prompt, cache_implementation="static", **GREEDY)


@pytest.mark.parametrize(
    "shape",
    [
        ExpertmeshConfig.of(DecoderConfig(**GROUPED)),
        OpenMoeConfig.of(decoder_preset("openmoe-test")),
    ],
    ids=["expertmesh", "openmoe"],
)
def test_attention_is_sdpa_and_nothing_else(shape: Any, tmp_path: Path) -> None:
    shape.save_pretrained(tmp_path)

    def build(name: str | None) -> Any:
        config = type(shape).from_pretrained(tmp_path)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=name)

    for name in (None, "sdpa"):
        assert build(name).config._attn_implementation == "sdpa"
    for name in ("eager", "flash_attention_2", "flex_attention"):
        with pytest.raises(UserError, match=f"must be 'sdpa', got '{name}'"):
            build(name)
