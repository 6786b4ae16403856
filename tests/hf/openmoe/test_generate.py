"""Generation: the cache, padding on the left, streaming, stopping."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextStreamer

from expertmesh.errors import UserError
from expertmesh.hf import OpenMoeForCausalLM, OpenMoeTokenizer, StopAtEndOfAnswer, as_openmoe
from expertmesh.hf.openmoe import END_OF_ANSWER
from expertmesh.models import DecoderLM, decoder_preset
from tests.openmoe.vocabulary import write_small

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def decoder() -> DecoderLM:
    """Float64, in evaluation."""
    config = decoder_preset("openmoe-test", vocab_size=700, max_seq_len=24)
    return DecoderLM(config, seed=3).double().eval()


@pytest.fixture
def model(decoder: DecoderLM) -> OpenMoeForCausalLM:
    return as_openmoe(decoder, eos_token_id=None)


def greedy(decoder: DecoderLM, tokens: Tensor, count: int) -> Tensor:
    """The definition: the whole sequence each time, without a cache."""
    for _ in range(count):
        tokens = torch.cat([tokens, decoder(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_is_the_argmax(
    model: OpenMoeForCausalLM, decoder: DecoderLM, tokens: Tensor, use_cache: bool
) -> None:
    generated = model.generate(tokens, use_cache=use_cache, **GREEDY)
    assert torch.equal(generated, greedy(decoder, tokens, 6))


def test_every_cached_step_is_the_full_forward(
    model: OpenMoeForCausalLM, decoder: DecoderLM, tokens: Tensor
) -> None:
    padded = torch.cat([torch.zeros_like(tokens[:, :3]), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    cache = None
    whole = decoder(tokens)
    steps = [slice(0, 5), *(slice(i, i + 1) for i in range(5, padded.shape[1]))]
    for step in steps:
        out = model(
            padded[:, step],
            attention_mask=mask[:, : step.stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        torch.testing.assert_close(
            out.logits[:, -1], whole[:, step.stop - 4], rtol=1e-11, atol=1e-11
        )


def test_padding_on_the_left_and_company_change_no_token(
    model: OpenMoeForCausalLM, decoder: DecoderLM, tokens: Tensor
) -> None:
    rows = [tokens[0, :2], tokens[1], tokens[0, :5]]
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(longest).ge(longest - len(row)).long() for row in rows])
    for given in ({"attention_mask": mask}, {}):
        generated = model.generate(ids, **given, **GREEDY)
        for row, text in zip(rows, generated, strict=True):
            alone = greedy(decoder, row[None], 6)[0]
            assert torch.equal(text[longest - len(row) :], alone)


def test_a_prompt_of_the_beginning_alone(model: OpenMoeForCausalLM, decoder: DecoderLM) -> None:
    begin = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(model.generate(begin, **GREEDY), greedy(decoder, begin, 6))


def test_sampling_follows_the_seed(model: OpenMoeForCausalLM, tokens: Tensor) -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate(tokens, max_new_tokens=9, do_sample=True, top_p=0.9))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_streaming_prints_the_text(
    model: OpenMoeForCausalLM,
    decoder: DecoderLM,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_small(folder)
    tokenizer = OpenMoeTokenizer.from_pretrained(folder)
    inputs = tokenizer("the router says", return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    generated = model.generate(**inputs, streamer=streamer, max_new_tokens=4, do_sample=False)
    new = generated[0, inputs["input_ids"].shape[1] :]
    assert torch.equal(generated, greedy(decoder, inputs["input_ids"], 4))
    assert capsys.readouterr().out.strip() == tokenizer.decode(new).strip()


def test_an_answer_ends_where_the_end_is_spelled_out() -> None:
    stop = StopAtEndOfAnswer(2)
    prompt = torch.tensor([[0, 8], [0, 8]])
    ending = torch.tensor(END_OF_ANSWER)
    assert stop(prompt, None).tolist() == [False, False]
    texts = torch.cat([prompt, torch.stack([ending, ending.flip(0)])], dim=1)
    assert stop(texts, None).tolist() == [True, False]
    # What the prompt spells does not count.
    assert StopAtEndOfAnswer(3)(texts, None).tolist() == [False, False]


def test_the_stop_rule_ends_a_text(model: OpenMoeForCausalLM, tokens: Tensor) -> None:
    whole = model.generate(tokens[:1], **GREEDY)[0].tolist()
    stop = StopAtEndOfAnswer(7, ending=whole[8:10])
    stopped = model.generate(tokens[:1], stopping_criteria=[stop], **GREEDY)[0].tolist()
    assert stopped == whole[:10]


def test_embeddings_in_place_of_ids_are_refused(
    model: OpenMoeForCausalLM, decoder: DecoderLM, tokens: Tensor
) -> None:
    with pytest.raises(UserError, match="inputs_embeds is not supported"):
        model.generate(inputs_embeds=decoder.embedding(tokens), **GREEDY)
    with pytest.raises(UserError, match="inputs_embeds is not supported"):
        model(inputs_embeds=decoder.embedding(tokens))
