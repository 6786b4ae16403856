import pytest
import torch

from expertmesh.random import RandomKey
from expertmesh.routing import (
    ROUTER_PRESETS,
    Capacity,
    ImportanceLoss,
    InputJitter,
    LoadBalancingLoss,
    LoadLoss,
    ZLoss,
    router_preset,
)
from expertmesh.routing.presets import OPENMOE_CAPACITIES
from expertmesh.routing.scope import scope_size

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


def test_presets_of_codes_are_set_as_published():
    local = make("gshard_local")
    assert local.capacity.scope == local.losses[0].scope == "sequence"
    assert (local.k, local.renormalize, local.skip.threshold) == (2, "chosen", 0.5)
    glam = make("glam")
    assert (glam.renormalize, glam.skip, glam.capacity.factor) == ("chosen", None, 2.0)
    v_moe = make("v_moe")
    assert (v_moe.k, v_moe.renormalize, v_moe.capacity.formula) == (2, "no", "vmoe")
    assert {(loss.name, loss.coef) for loss in v_moe.losses} == {
        ("importance", 0.005),
        ("load", 0.005),
    }
    assert v_moe.noise.std is None
    assert (make("qwen2_moe").k, make("qwen2_moe").renormalize) == (4, "no")
    llama4 = make("llama4")
    assert (llama4.k, llama4.score, llama4.renormalize) == (1, "sigmoid", "no")
    gpt_oss = make("gpt_oss")
    assert (gpt_oss.k, gpt_oss.renormalize) == (4, "chosen")
    assert gpt_oss.logit_bias_E.shape == (32,)
    assert make("mixtral").logit_bias_E is None
    deepseek = make("deepseek_moe")
    assert (deepseek.k, deepseek.renormalize, deepseek.losses[0].scope) == (6, "no", "micro_batch")
    tutel = make("tutel")
    assert (tutel.renormalize, tutel.capacity.formula) == ("chosen", "tutel")
    deepspeed = make("deepspeed")
    assert (deepspeed.k, deepspeed.renormalize, deepspeed.capacity.order) == (1, "no", "random")
    top2 = make("deepspeed_top2")
    assert (top2.k, top2.renormalize, top2.sampling) == (2, "kept", "second")
    assert (top2.capacity.order, top2.capacity.formula) == ("position", "deepspeed")
    assert deepspeed.sampling == "no"
    topk = make("deepspeed_topk")
    assert (topk.renormalize, topk.capacity.order) == ("kept", "probability")
    megatron = make("megatron")
    assert (megatron.renormalize, megatron.capacity) == ("chosen", None)
    assert megatron.losses[0].form == "megablocks"


def test_openmoe_and_its_capacities():
    router = make("openmoe")
    assert (router.k, router.renormalize, router.capacity, router.noise) == (2, "no", None, None)
    assert [(loss.name, loss.coef) for loss in router.losses] == [("balance", 0.01), ("z", 1e-4)]
    assert router.losses[0].form == "huggingface"  # k at balance, not 1
    assert router.init_std == 0.02
    for name, capacity in OPENMOE_CAPACITIES.items():
        assert make("openmoe", capacity=name).capacity == capacity
    with pytest.raises(ValueError, match=r"one of jax, jax_34b, pytorch, or a table.*'jax'"):
        make("openmoe", capacity="jx")
    with pytest.raises(ValueError, match="capacity of router 'olmoe' must be a table such as"):
        make("olmoe", capacity="jax")


@pytest.mark.parametrize(
    ("name", "num_tokens", "training", "evaluation"),
    [
        ("pytorch", 2048, 160, 256),
        ("pytorch", 32768, 2560, 4096),
        ("pytorch", 1, 4, 4),
        ("jax", 2048, 80, 128),
        ("jax", 4096, 160, 256),
        ("jax", 32768, 160, 256),
        ("jax", 1, 4, 4),
        ("jax_34b", 32768, 320, 512),
    ],
)
def test_slots_of_openmoe(name, num_tokens, training, evaluation):
    capacity = OPENMOE_CAPACITIES[name]
    size = scope_size(capacity.scope, num_tokens, None)
    assert capacity.slots(size, 32, 2, training=True) == training
    assert capacity.slots(size, 32, 2, training=False) == evaluation


@pytest.mark.parametrize("name", OPENMOE_CAPACITIES)
def test_padding_takes_no_slot(name):
    """Its left padding had the first slots in the PyTorch code; here real tokens have them."""
    router = make("openmoe", capacity=name)
    with torch.no_grad():
        router.weight_ED.zero_()
        router.weight_ED[3], router.weight_ED[5] = 1.0, 0.5
    padding = torch.arange(256) < 200
    routing = router(torch.ones(256, DIM), padding_mask=padding)
    slots = router.capacity.slots(256, 32, 2, training=True)
    kept = (routing.expert_TK < 32).all(dim=1)
    assert not kept[:200].any()
    assert kept[200 : 200 + slots].all()
    assert int(kept.sum()) == slots < 56
    assert int(routing.dropped_TK.sum()) == 2 * (56 - slots)


@pytest.mark.parametrize(
    ("scope", "num_tokens", "size"),
    [
        ("<=4096", 8192, 4096),
        ("<=4096", 6000, 3000),
        ("<=4096", 5, 5),
        ("<=4", 7, 1),
        ("<=4", 0, 1),
    ],
)
def test_groups_of_at_most_so_many(scope, num_tokens, size):
    assert scope_size(scope, num_tokens, None) == size


@pytest.mark.parametrize("scope", ["<=0", "<=", "<=x", "<= 4", "4096", "=<4"])
def test_malformed_groups(scope):
    with pytest.raises(ValueError, match="at most so many as '<=4096'"):
        Capacity(factor=1.0, scope=scope)


def test_random_token_selection_serves_as_many_but_others():
    x = torch.randn(64, DIM, generator=torch.Generator().manual_seed(0))
    kept = []
    for step in range(2):
        router = make("deepspeed", seed=1, init_std=1.0, capacity={"factor": 0.5})
        routing = router(x, key=RandomKey.of(0, step, torch.arange(64)))
        kept.append(routing.expert_TK < 32)
        assert int((routing.chosen_TK == 32).sum()) == 0
    assert kept[0].sum() == kept[1].sum() < 64
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(router.eval()(x).expert_TK, router(x).expert_TK)


def test_logit_bias_moves_choices_and_is_trained():
    router = make("gpt_oss")
    x = torch.randn(5, DIM)
    with torch.no_grad():
        router.logit_bias_E[7] = 100.0
    routing = router(x)
    assert (routing.expert_TK[:, 0] == 7).all()
    routing.weight_TK[:, 0].sum().backward()
    assert router.logit_bias_E.grad.shape == (32,)
    router.reset_parameters(0)
    assert router.logit_bias_E.abs().sum() == 0


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


def test_the_balance_coefficient_is_that_of_whatever_balances():
    losses = make("v_moe", balance_coef=0.25).losses
    importance = ImportanceLoss(coef=0.25, of="clean_probabilities")
    assert losses == (importance, LoadLoss(coef=0.25, threshold="kth"))
    assert make("v_moe", balance_coef=0).losses == ()
    added = make("mixtral", losses=(), balance_coef=0.25).losses
    assert added == (LoadBalancingLoss(coef=0.25),)


@pytest.mark.parametrize("options", [{}, {"bias_rate": 0.1}])
def test_the_device_is_that_of_buffers_too(options):
    router = make("deepseek_v3", device="meta", **options)
    values = [*router.parameters(), *router.buffers()]
    assert len(values) == 3
    assert all(value.is_meta for value in values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": {"fctor": 1}}, r"capacity\.fctor is unknown; did you mean 'factor'"),
        ({"losses": ZLoss(coef=1.0), "balance_coef": 0.1}, "losses must be a sequence of balance"),
        ({"capacity": 1.25}, r"capacity must be a Capacity.*got 1.25; set capacity=Capacity\(fac"),
        ({"capacity": {"eval_factor": 1}}, "capacity has no factor, which has no default"),
        ({"capacity": {"factor": "1"}}, "capacity factor must be a finite number above 0"),
        ({"group_limit": {"groups": 4}}, r"group_limit\.groups is unknown; did you mean 'num_gr"),
        ({"group_limit": {"num_groups": 4}}, "group_limit has no kept"),
        (
            {"group_limit": {"num_groups": 0, "kept": 1}},
            "num_experts must be a multiple of num_groups=0",
        ),
    ],
)
def test_malformed_tables(options, message):
    with pytest.raises(ValueError, match=message):
        make("mixtral", **options)


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'mixtral'"):
        make("mixtrl")
    with pytest.raises(ValueError, match="router option 'renormalise' is unknown; did you mean"):
        make("mixtral", renormalise="no")
