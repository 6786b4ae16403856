"""Running out of positions, of which padding takes none."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.hf import OpenMoeForCausalLM, as_openmoe
from expertmesh.models import DecoderLM, decoder_preset

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def decoder() -> DecoderLM:
    """Float64, in evaluation."""
    config = decoder_preset("openmoe-test", vocab_size=700, max_seq_len=24)
    return DecoderLM(config, seed=3).double().eval()


@pytest.fixture
def model(decoder: DecoderLM) -> OpenMoeForCausalLM:
    return as_openmoe(decoder, eos_token_id=None)


def padded(tokens: Tensor, width: int) -> dict[str, Tensor]:
    """The tokens at the end of rows of ``width``, the second row one shorter, and the mask."""
    batch, length = tokens.shape
    ids = torch.zeros(batch, width, dtype=torch.int64)
    ids[:, -length:] = tokens
    ids[1, -length : 2 - length] = 0
    mask = torch.arange(width).ge(width - length).long().repeat(batch, 1)
    mask[1, -length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_prompt_longer_than_the_positions_is_refused(model: OpenMoeForCausalLM) -> None:
    long = torch.ones(1, 25, dtype=torch.int64)
    with pytest.raises(UserError, match=r"prompt has 25 tokens.* 24 positions.* at most 23"):
        model.generate(long, **GREEDY)
    with pytest.raises(UserError, match="the sequence has 25 tokens, but the model has 24"):
        model(long)


def test_more_new_tokens_than_positions_are_refused(
    model: OpenMoeForCausalLM, tokens: Tensor
) -> None:
    with pytest.raises(UserError, match="18 new tokens; set max_new_tokens=17"):
        model.generate(tokens, max_new_tokens=18)
    assert model.generate(tokens, max_new_tokens=17, do_sample=False).shape == (2, 24)


def test_padding_takes_no_position(
    model: OpenMoeForCausalLM, decoder: DecoderLM, tokens: Tensor
) -> None:
    padded = torch.cat([torch.zeros(2, 20, dtype=torch.int64), tokens], dim=1)
    mask = torch.arange(27).ge(20).long().expand(2, -1)
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, -1],
        decoder(tokens)[:, -1],
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize("width", [20, 24, 40])
@pytest.mark.parametrize("use_cache", [True, False])
def test_as_much_is_generated_with_padding_as_without(
    model: OpenMoeForCausalLM,
    tokens: Tensor,
    width: int,
    use_cache: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"max_new_tokens": 17, "do_sample": False, "use_cache": use_cache}
    given = padded(tokens, width)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        for guessed in ({}, {"attention_mask": given["attention_mask"]}):
            written = model.generate(given["input_ids"], **guessed, **options)
            for row in range(2):
                begin = given["attention_mask"][row].argmax()
                alone = model.generate(given["input_ids"][row : row + 1, begin:], **options)
                assert torch.equal(written[row, begin:], alone[0])
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "maximum length" not in caplog.text


def test_more_than_the_positions_is_refused_with_padding_too(
    model: OpenMoeForCausalLM, tokens: Tensor
) -> None:
    given = padded(tokens, 40)
    told = r"a prompt of 7 tokens besides padding leaves 17 of the model's 24 positions, got 18 new"
    with pytest.raises(UserError, match=told):
        model.generate(**given, max_new_tokens=18)
    with pytest.raises(UserError, match=told):
        model.generate(given["input_ids"], max_length=58)
    long = padded(torch.ones(2, 30, dtype=torch.int64), 40)
    with pytest.raises(UserError, match="the prompt has 30 tokens besides padding, but"):
        model.generate(**long, max_new_tokens=1)


@pytest.mark.parametrize("width", [7, 40])
def test_the_usual_length_is_cut_to_the_positions(
    model: OpenMoeForCausalLM, tokens: Tensor, width: int
) -> None:
    """transformers writes 20 tokens where nobody says how many."""
    with pytest.warns(UserWarning, match="max_new_tokens"):
        assert model.generate(**padded(tokens, width)).shape == (2, width + 17)
    with pytest.warns(UserWarning, match="max_new_tokens"):
        assert model.generate(**padded(tokens[:, :3], width)).shape == (2, width + 20)
