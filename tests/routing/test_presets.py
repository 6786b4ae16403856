import pytest
import torch

from expertmesh.routing import (
    ROUTER_PRESETS,
    Capacity,
    InputJitter,
    LoadBalancingLoss,
    ZLoss,
    router_preset,
)

DIM = 16


def make(name, **options):
    return router_preset(name, dim=DIM, num_experts=32, **options)


@pytest.mark.parametrize("name", ROUTER_PRESETS)
def test_every_preset_routes_and_trains(name):
    torch.manual_seed(0)
    router = make(name)
    routing = router(torch.randn(64, DIM), sequence_length=32)
    assert routing.expert_TK.shape == (64, router.k)
    assert routing.losses
    (routing.weight_TK.sum() + sum(routing.losses.values())).backward()
    assert router.weight_ED.grad.abs().sum() > 0


def test_presets_are_set_as_published():
    switch = make("switch")
    assert (switch.k, switch.renormalize, switch.capacity.factor) == (1, "no", 1.25)
    assert isinstance(switch.noise, InputJitter)
    assert switch.init_std == pytest.approx((0.1 / DIM) ** 0.5)
    gshard = make("gshard")
    assert (gshard.k, gshard.renormalize, gshard.skip.threshold) == (2, "chosen", 0.5)
    st_moe = make("st_moe")
    assert (st_moe.renormalize, st_moe.skip.ratio, st_moe.capacity.eval_factor) == ("no", 0.2, 2.0)
    assert {loss.name for loss in st_moe.losses} == {"balance", "z"}
    mixtral = make("mixtral")
    assert (mixtral.k, mixtral.renormalize, mixtral.capacity) == (2, "chosen", None)
    olmoe = make("olmoe")
    assert (olmoe.k, olmoe.renormalize) == (8, "no")
    assert make("qwen3_moe").renormalize == "chosen"
    v3 = make("deepseek_v3")
    assert (v3.score, v3.renormalize, v3.scale, v3.bias.rate) == ("sigmoid", "chosen", 2.5, 1e-3)
    assert (v3.group_limit.num_groups, v3.group_limit.kept) == (8, 4)
    assert v3.losses[0].scope == "sequence"


def test_overrides():
    router = make(
        "mixtral", k=4, balance_coef=0.5, z_coef=1e-3, bias_rate=0.01, capacity={"factor": 2.0}
    )
    assert router.k == 4
    assert router.bias.rate == 0.01
    assert router.losses == (
        LoadBalancingLoss(coef=0.5, form="huggingface"),
        ZLoss(coef=1e-3),
    )
    assert router.capacity == Capacity(factor=2.0)
    assert make("olmoe", balance_coef=0, z_coef=0).losses == ()
    assert make("switch", capacity=None).capacity is None
    looser = make("switch", capacity={"factor": 2.0}).capacity
    assert looser == Capacity(factor=2.0, eval_factor=2.0, formula="switch")


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'mixtral'"):
        make("mixtrl")
    with pytest.raises(ValueError, match="router option 'renormalise' is unknown; did you mean"):
        make("mixtral", renormalise="no")
