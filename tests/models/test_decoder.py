"""What a decoder must hold whatever its shape: causality, caches, padding, initial values."""

import warnings

import pytest
import torch
from torch import Tensor

from expertmesh import MoELoss, RandomKey
from expertmesh.models import DecoderConfig, DecoderLM
from tests.models.conftest import GROUPED, LATENT


class GrowingCache:
    """The least that a cache must do."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[-2] if self.layers else 0

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            old_key, old_value = self.layers[layer]
            key = torch.cat([old_key, key], dim=-2)
            value = torch.cat([old_value, value], dim=-2)
        self.layers[layer] = (key, value)
        return key, value


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_later_tokens_change_nothing(model: DecoderLM, tokens: Tensor) -> None:
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 31
    before, after = model(tokens), model(changed)
    close(after[:, :4], before[:, :4])
    assert not torch.allclose(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [4, 3], [3, 1, 3]], ids=str)
def test_cached_equals_uncached(model: DecoderLM, tokens: Tensor, chunks: list[int]) -> None:
    cache = GrowingCache()
    parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    close(torch.cat(parts, dim=1), model(tokens))


@pytest.mark.parametrize("chunks", [[10], [6, 1, 1, 1, 1], [5, 5]], ids=str)
def test_left_padding_equals_none(model: DecoderLM, tokens: Tensor, chunks: list[int]) -> None:
    padded = torch.cat([torch.full((2, 3), 5), tokens], dim=1)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, :3] = True
    cache, done, parts = GrowingCache(), 0, []
    for part in padded.split(chunks, dim=1):
        done += part.shape[1]
        parts.append(model(part, cache=cache, padding_mask=mask[:, :done]))
    close(torch.cat(parts, dim=1)[:, 3:], model(tokens))


def test_right_padding_equals_none(model: DecoderLM, tokens: Tensor) -> None:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 5:] = True
    padded = model(tokens, padding_mask=mask)
    close(padded[0], model(tokens[:1])[0])
    close(padded[1, :5], model(tokens[1:, :5])[0])


def test_rows_of_padding_stay_finite(model: DecoderLM, tokens: Tensor) -> None:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1] = True
    model.train()
    logits = model(tokens, padding_mask=mask)
    assert logits.isfinite().all()
    logits[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_explicit_positions_are_used(tokens: Tensor) -> None:
    model = DecoderLM(DecoderConfig(**{**GROUPED, "position": "learned"})).double().eval()
    close(model(tokens, positions=torch.arange(7)[None]), model(tokens))
    assert not torch.allclose(model(tokens, positions=torch.arange(7).flip(0)[None]), model(tokens))


def test_rotary_logits_depend_on_distance_only(tokens: Tensor) -> None:
    for shape in (GROUPED, LATENT):
        model = DecoderLM(DecoderConfig(**shape)).double().eval()
        close(model(tokens, positions=torch.arange(9, 16)[None]), model(tokens))
        spread = torch.arange(0, 14, 2)[None]
        assert not torch.allclose(model(tokens, positions=spread), model(tokens))


def test_grouped_heads_equal_repeated_heads(tokens: Tensor) -> None:
    grouped = DecoderLM(DecoderConfig(**GROUPED)).double().eval()
    full = DecoderLM(DecoderConfig(**{**GROUPED, "num_kv_heads": 4})).double().eval()
    state = grouped.state_dict()
    for name in list(state):
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    close(full(tokens), grouped(tokens))
    close(grouped(tokens, padding_mask=mask), grouped(tokens))


def test_recorded_decisions_can_be_followed(tokens: Tensor) -> None:
    model = DecoderLM(DecoderConfig(**GROUPED)).double().eval()
    record: dict = {}
    logits = model(tokens, record=record)
    assert list(record) == [1]
    assert record[1].expert_TK.shape == (14, 2)
    router = model.blocks[1].moe.router
    with torch.no_grad():
        router.weight_ED.neg_()
    replayed: dict = {}
    other = model(tokens, routing=record, record=replayed)
    assert torch.equal(replayed[1].expert_TK, record[1].expert_TK)
    assert not torch.allclose(other, logits)
    other.sum().backward()
    assert router.weight_ED.grad.abs().sum() > 0


def test_every_parameter_gets_a_gradient(config: DecoderConfig, tokens: Tensor) -> None:
    model = DecoderLM(config).double()
    model(tokens).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_misshapen_input_is_refused(tokens: Tensor) -> None:
    model = DecoderLM(DecoderConfig(**{**GROUPED, "position": "learned", "max_seq_len": 8}))
    with pytest.raises(ValueError, match=r"tokens must have shape \(B, S\), got \(7,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"padding_mask must have shape .*\(2, 7\), got \(2, 6\)"):
        model(tokens, padding_mask=torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"padding_mask must be bool, .* got torch.int64"):
        model(tokens, padding_mask=torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most max_seq_len=8 long"):
        model(tokens.repeat(1, 2))


def test_tokens_of_no_length_give_no_logits() -> None:
    model = DecoderLM(DecoderConfig(**GROUPED))
    assert model(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0, 31)


def test_balance_losses_attach_themselves_or_are_returned(tokens: Tensor) -> None:
    options = {"router_options": {"balance_coef": 1.0}}
    attached = DecoderLM(DecoderConfig(**GROUPED, **options)).double()
    returned = DecoderLM(DecoderConfig(**GROUPED, **options, losses="return")).double()
    attached(tokens).sum().backward()
    loss = MoELoss()
    logits = returned(tokens)
    (logits.sum() + loss(returned)).backward()
    close(
        returned.blocks[1].moe.router.weight_ED.grad, attached.blocks[1].moe.router.weight_ED.grad
    )
    record: dict = {}
    returned(tokens, record=record)
    assert loss(returned) == 0
    assert loss(list(record.values())) > 0


def test_noise_follows_the_key(tokens: Tensor) -> None:
    shape = {**GROUPED, "router": "switch", "experts_per_token": 1, "moe_every": 1}
    model = DecoderLM(DecoderConfig(**{**shape, "dense_hidden": None})).double()
    index = torch.arange(14).view(2, 7)
    first, again, later = (model(tokens, key=RandomKey.of(0, step, index)) for step in (1, 1, 2))
    close(first, again)
    assert not torch.equal(first, later)


def test_autocast_keeps_the_residual_wide(tokens: Tensor) -> None:
    model = DecoderLM(DecoderConfig(**{**GROUPED, "qk_norm": "head"})).eval()
    read, residual = [], []
    for block in model.blocks:
        block.attention_norm.register_forward_hook(lambda *call: read.append(call[-1].dtype))
        block.register_forward_hook(lambda *call: residual.append(call[-1].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden = model.hidden(tokens)
    assert set(residual) == {torch.float32}
    assert {hidden.dtype, *read} == {torch.bfloat16}  # rounded once, for all products
    torch.testing.assert_close(hidden.float(), model.hidden(tokens), rtol=0.1, atol=0.1)
