import math

import pytest
import torch

from expertmesh.data.tokenizer import ByteTokenizer
from expertmesh.errors import CausalityWarning
from expertmesh.layer import moe_layers
from expertmesh.train.expert_tokens import ExpertTokens
from tests.train.test_evaluate import make_evaluator, make_model, over
from tests.train.tiny import MODEL


def test_every_choice_is_counted_and_rank_by_divergence() -> None:
    model = make_model()
    evaluator = make_evaluator()
    with ExpertTokens(model, 258) as counts:
        evaluation = evaluator(over(model))
    (name,) = moe_layers(model)
    count_EV = counts.count_EV[name]
    assert int(count_EV.sum()) == evaluation.num_targets * MODEL["experts_per_token"]
    layer = counts.table(ByteTokenizer())["layers"][name]
    assert len(layer["experts"]) == MODEL["num_experts"]
    share_V = count_EV.sum(0) / count_EV.sum()
    for count_V, entries in zip(count_EV, layer["experts"], strict=True):
        assert len(entries) <= 12
        weights = [count * math.log(lift) for _, count, lift in entries]
        assert weights == sorted(weights, reverse=True)
        if entries:
            text, count, lift = entries[0]
            token = next(t for t in range(258) if ByteTokenizer().token_text(t) == text)
            assert count == count_V[token]
            expected = count_V[token] / count_V.sum() / share_V[token]
            assert lift == pytest.approx(float(expected), abs=1e-4)


def test_choices_of_experts_that_choose_are_counted() -> None:
    with pytest.warns(CausalityWarning):
        model = make_model(router="expert_choice")
    tokens_BS = torch.arange(16).view(2, 8)
    record: dict = {}
    with ExpertTokens(model, 258) as counts:
        model(tokens_BS, record=record)
    (count_EV,), (routing,) = counts.count_EV.values(), record.values()
    expected = torch.zeros_like(count_EV)
    for row, expert in enumerate(routing.expert_TK[:, 0].tolist()):
        expected[expert, tokens_BS.flatten()[routing.token_N[row]]] += 1
    assert torch.equal(count_EV, expected)


def test_hooks_are_gone_afterwards() -> None:
    model = make_model()
    with ExpertTokens(model, 258) as counts:
        make_evaluator()(over(model))
    before = {name: count.clone() for name, count in counts.count_EV.items()}
    make_evaluator()(over(model))
    assert all(torch.equal(counts.count_EV[name], count) for name, count in before.items())


def test_dense_models_have_an_empty_table() -> None:
    model = make_model(num_experts=0, experts_per_token=0, expert_hidden=0, moe_every=1)
    with ExpertTokens(model, 258) as counts:
        make_evaluator()(over(model))
    assert counts.table(ByteTokenizer()) == {"layers": {}}
