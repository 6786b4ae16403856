"""Other routers in a decoder, and the warning about those that let the future through."""

import subprocess
import sys
import warnings

import pytest
import torch

import expertmesh as em
from expertmesh.errors import CausalityWarning, UserError
from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig, DecoderLM, replace_routers
from expertmesh.routing import Router, Routing
from expertmesh.routing.noise import LearnedNoise
from expertmesh.testing import is_causal
from tests.models.conftest import GROUPED

TIGHT = {"capacity": {"factor": 1.0, "order": "priority"}}


class Crowd(Router):
    """Each token takes expert 0 if most tokens are positive there: the future decides too."""

    leaks = "the sign of all tokens' sum decides"

    def __init__(self, dim, num_experts):
        super().__init__()
        self.dim, self.num_experts, self.layer = dim, num_experts, 0

    def forward(self, x_TD, *, padding_mask=None, routing=None, **others):
        expert_TK = (x_TD.sum() > 0).long().expand(len(x_TD), 1)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_TK,
            weight_TK=torch.ones_like(expert_TK, dtype=x_TD.dtype),
            chosen_TK=expert_TK,
            load_E=expert_TK.flatten().bincount(minlength=self.num_experts),
        )

    def reset_parameters(self, seed):
        pass


class Blind(Crowd):
    leaks = None


def decoder(**changes):
    shape = {**GROUPED, "moe_every": 1, "dense_hidden": None, **changes}
    return DecoderLM(DecoderConfig(**shape), seed=1)


def test_a_router_that_leaks_is_named_once_and_the_caller_is_shown():
    with pytest.warns(CausalityWarning, match="TopKRouter in a causal decoder") as seen:
        decoder(router_options=TIGHT)
    assert len(seen) == 1  # not for each of three layers
    assert seen[0].filename == __file__


def test_the_probe_agrees():
    with pytest.warns(CausalityWarning):
        leaky = decoder(router_options=TIGHT)
    assert not is_causal(leaky, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = decoder()
    assert is_causal(quiet, training=True)
    assert is_causal(quiet)


def test_replaced_routers_route_and_warn():
    model = decoder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_routers(model, lambda number: Blind(16, 4))
    with pytest.warns(CausalityWarning, match="the sign of all tokens' sum decides") as seen:
        replace_routers(model, lambda number: Crowd(16, 4))
    assert len(seen) == 1
    assert all(isinstance(moe.router, Crowd) for moe in moe_layers(model).values())
    assert not is_causal(model)
    numbers = []
    replace_routers(model, lambda number: numbers.append(number) or em.TopKRouter(16, 4, 1))
    assert numbers == [0, 1, 2]
    assert is_causal(model)


def test_replaced_routers_are_in_the_mode_of_those_before():
    model, tokens = decoder().eval(), torch.arange(6)[None]

    def noisy(number):
        return em.TopKRouter(16, 4, 1, noise=LearnedNoise(16, 4), seed=number, layer=number)

    replace_routers(model, noisy)
    assert torch.equal(model(tokens), model(tokens))  # evaluation draws nothing
    replace_routers(model.train(), noisy)
    assert not torch.equal(model(tokens), model(tokens))


def test_a_router_that_does_not_fit_is_refused():
    with pytest.raises(
        UserError, match=r"blocks.0.moe must have the experts' num_experts=4, got 8"
    ):
        replace_routers(decoder(), lambda number: em.TopKRouter(16, 8, 1))


def test_a_bare_layer_may_be_part_of_an_encoder_and_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moe = em.MoE(Crowd(16, 4), em.MLPExperts(16, 8, 4))
        moe(torch.randn(2, 5, 16))


def test_dense_decoders_have_nothing_to_warn_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder(num_experts=0, experts_per_token=0, expert_hidden=0, dense_hidden=24)


def test_a_warning_can_be_silenced_by_its_public_name():
    code = (
        "import warnings, expertmesh as em; from expertmesh.models import *;"
        "warnings.simplefilter('error'); warnings.simplefilter('ignore', em.CausalityWarning);"
        "DecoderLM(decoder_preset('nano', router='gshard'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
