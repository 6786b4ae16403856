"""The form of a decoder's experts: by the router's name, by its own field, and what is refused."""

from typing import Any

import pytest
import torch

from expertmesh.experts import DoublyGatedMLPExperts, GatedMLPExperts
from expertmesh.experts.scaled_input import ScaledInputExperts
from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.experts import form_of
from tests.models.conftest import GROUPED


def decoder(**changes: Any) -> DecoderLM:
    return DecoderLM(DecoderConfig(**{**GROUPED, **changes}))


def experts(**changes: Any) -> Any:
    (moe,) = moe_layers(decoder(**changes)).values()
    return moe.experts


def test_routers_bring_their_models_experts() -> None:
    llama4 = experts(router="llama4", experts_per_token=1)
    assert isinstance(llama4, ScaledInputExperts)
    gpt_oss = experts(router="gpt_oss")
    assert isinstance(gpt_oss, GatedMLPExperts)
    assert gpt_oss.activation.name == "clamped_swiglu"
    assert gpt_oss.gate_up_bias is not None
    assert gpt_oss.down_bias is not None
    plain = experts(router="mixtral")
    assert isinstance(plain, GatedMLPExperts)
    assert plain.gate_up_bias is None


def test_the_field_says_otherwise() -> None:
    assert isinstance(experts(expert_form="scaled_input"), ScaledInputExperts)
    assert isinstance(experts(router="gpt_oss", expert_form="plain"), GatedMLPExperts)
    both = experts(mlp="doubly_gated", expert_form="scaled_input")
    assert isinstance(both.experts, DoublyGatedMLPExperts)
    assert form_of(DecoderConfig(**GROUPED, expert_form="gpt_oss")) == "gpt_oss"


@pytest.mark.parametrize("form", ["scaled_input", "gpt_oss"])
def test_parameters_are_counted_and_trained(form: str) -> None:
    model = decoder(expert_form=form)
    params = dict(model.named_parameters())
    assert model.config.num_params == sum(p.numel() for p in params.values())
    of_experts = sum(p.numel() for name, p in params.items() if ".experts." in name)
    idle = of_experts * 2 // 4  # two of four are chosen
    assert model.config.num_active_params == model.config.num_params - idle
    model(torch.arange(14).view(2, 7)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_reaches_the_experts() -> None:
    assert experts(expert_dropout=0.4).dropout == 0.4
    assert experts(router="llama4", experts_per_token=1, expert_dropout=0.4).dropout == 0.4
    assert experts(router="gpt_oss", expert_dropout=0.1).dropout == 0.1


DENSE = {"num_experts": 0, "experts_per_token": 0, "expert_hidden": 0, "moe_every": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_form": "llama"}, "expert_form must be one of auto, plain, scaled_input, gpt_oss"),
        ({"expert_form": "gpt_oss", "mlp": "doubly_gated"}, "mlp must be 'gated' for gpt-oss's"),
        ({"expert_dropout": 1.0}, "expert_dropout must be at least 0 and below 1, got 1.0"),
        ({**DENSE, "expert_dropout": 0.1}, "expert_dropout=0.1 have no meaning without experts"),
        ({**DENSE, "expert_form": "plain"}, "expert_form='plain' and .* have no meaning without"),
    ],
    ids=str,
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**GROUPED, **changes})
