"""What a context that looks at routings is shown, and when."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertmesh.errors import CausalityWarning
from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.routing import Router, Routing
from expertmesh.train.routings import EveryRouting
from tests.train.tiny import MODEL


class Notes(EveryRouting):
    """Writes down what it is told."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.begun: dict[str, Router] = {}
        self.seen: list[tuple[str, Tensor, Routing]] = []

    def _begin(self, name: str, router: Router) -> None:
        self.begun[name] = router

    def _see(self, name: str, ids_T: Tensor, routing: Routing) -> None:
        self.seen.append((name, ids_T, routing))


def make_model(**overrides: Any) -> DecoderLM:
    return DecoderLM(DecoderConfig(**{**MODEL, "num_layers": 4, **overrides}), seed=2).eval()


TOKENS_BS = torch.arange(16).view(2, 8)


def test_each_layer_is_told_of_before_and_each_decision_once() -> None:
    model, record = make_model(), {}
    layers = moe_layers(model)
    with Notes(model) as notes:
        assert notes.begun == {name: moe.router for name, moe in layers.items()}
        assert notes.seen == []
        model(TOKENS_BS, record=record)
    assert [name for name, _, _ in notes.seen] == list(layers)
    for (_, ids_T, routing), recorded in zip(notes.seen, record.values(), strict=True):
        assert torch.equal(ids_T, TOKENS_BS.flatten())
        assert torch.equal(routing.expert_TK, recorded.expert_TK)


def test_what_is_recomputed_is_not_shown_again() -> None:
    model = make_model().train()
    model.checkpoint_blocks()
    with Notes(model) as notes:
        model(TOKENS_BS).sum().backward()
    assert [name for name, _, _ in notes.seen] == list(moe_layers(model))


def test_rows_of_experts_that_choose_have_the_ids_of_the_tokens_they_chose() -> None:
    with pytest.warns(CausalityWarning):
        model = make_model(router="expert_choice")
    with Notes(model) as notes:
        model(TOKENS_BS)
    for _, ids_N, routing in notes.seen:
        assert routing.token_N is not None
        assert torch.equal(ids_N, TOKENS_BS.flatten()[routing.token_N])


def test_nothing_is_shown_after_the_context_even_where_it_failed() -> None:
    model = make_model()
    notes = Notes(model)
    with pytest.raises(KeyError), notes:
        raise KeyError
    model(TOKENS_BS)
    assert notes.seen == []
    with notes:
        model(TOKENS_BS)
    assert len(notes.seen) == len(moe_layers(model))
