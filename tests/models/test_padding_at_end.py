"""Padding after a row's tokens needs no attention mask: the same logits and gradients."""

import pytest
import torch
from torch import Tensor

from expertmesh.models import DecoderConfig, DecoderLM, decoder_preset
from expertmesh.models.decoder import attention_mask_of
from expertmesh.testing import assert_close
from tests.train.tiny import MODEL


@pytest.mark.parametrize(
    "config",
    [DecoderConfig(**MODEL), decoder_preset("openmoe-test", vocab_size=258)],
    ids=["mixtral", "openmoe"],
)
def test_without_the_mask_real_tokens_see_the_same(config: DecoderConfig) -> None:
    tokens_BS = torch.randint(258, (3, 9), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.arange(9) >= torch.tensor([9, 4, 1])[:, None]
    found: list[dict[str, Tensor]] = []
    for at_end in (False, True):
        model = DecoderLM(config, seed=1).double()
        logits_BSV = model(tokens_BS, padding_mask=mask_BS, padded_at_end=at_end)
        real_TV = logits_BSV[~mask_BS]
        real_TV.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"logits": real_TV.detach(), **gradients})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert_close(name, found[1][name], expected, 1e-12)


def test_the_mask_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else scaled dot product attention could not be flash attention."""
    seen = []

    def spy(padding_mask: Tensor | None, past: int, tokens_BS: Tensor) -> Tensor | None:
        seen.append(attention_mask_of(padding_mask, past, tokens_BS))
        return seen[-1]

    monkeypatch.setattr("expertmesh.models.decoder.attention_mask_of", spy)
    model = DecoderLM(DecoderConfig(**MODEL))
    mask_BS = torch.tensor([[False, False, True]])
    for at_end in (False, True):
        model(torch.tensor([[1, 2, 3]]), padding_mask=mask_BS, padded_at_end=at_end)
    assert seen[0] is not None
    assert seen[1] is None
