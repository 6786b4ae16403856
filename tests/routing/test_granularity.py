import pytest
import torch
from torch import nn

from expertmesh.errors import UserError
from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey, normal
from expertmesh.routing import (
    BatchwiseRouter,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    HashRouter,
    HierarchicalRouter,
    LoadBalancingLoss,
    NormalNoise,
    RandomSecond,
    ThorRouter,
    ThresholdSecond,
    TopKRouter,
    UniformRouter,
)
from expertmesh.routing.granularity import PerSequence, PerTask
from expertmesh.testing import assert_close, run_on_ranks

DIM, E, K = 6, 5, 2


def inner(**options):
    return TopKRouter(
        DIM, E, K, renormalize="chosen", seed=1, init_std=1.0, dtype=torch.float64, **options
    )


def sequences(batch=4, length=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=generator)


def routed(router, x, **arguments):
    return router(x.reshape(-1, DIM), sequence_length=x.shape[1], **arguments)


def test_a_sequence_is_one_decision_from_the_mean_of_its_valid_tokens():
    x = sequences()
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, 2] = mask[1, 0] = True
    mask[3] = True
    x[mask] = torch.nan
    router = inner()
    routing = routed(PerSequence(router), x, padding_mask=mask.view(-1))
    for b in range(4):
        expected = None if mask[b].all() else router(x[b][~mask[b]].mean(0, keepdim=True))
        for t in range(3):
            row = 3 * b + t
            if mask[b, t]:
                assert (routing.expert_TK[row] == E).all()
                assert (routing.weight_TK[row] == 0).all()
            else:
                assert torch.equal(routing.expert_TK[row], expected.expert_TK[0])
                torch.testing.assert_close(routing.weight_TK[row], expected.weight_TK[0])
    assert int(routing.load_E.sum()) == K * int((~mask).sum())


def test_sequences_of_one_token_are_tokens():
    x = sequences(7, 1)
    loss = LoadBalancingLoss(coef=1.0)
    plain = routed(inner(losses=(loss,)), x)
    wrapped = routed(PerSequence(inner(losses=(loss,))), x)
    assert torch.equal(wrapped.expert_TK, plain.expert_TK)
    torch.testing.assert_close(wrapped.weight_TK, plain.weight_TK)
    torch.testing.assert_close(wrapped.losses["balance"], plain.losses["balance"])


def test_a_sequence_takes_one_slot_and_is_dropped_whole():
    x = sequences(6, 4)
    router = PerSequence(inner(capacity=Capacity(factor=0.9)))
    routing = routed(router, x)
    dropped_BLK = routing.dropped_TK.view(6, 4, K)
    assert 0 < dropped_BLK.sum() < 6 * 4 * K
    assert (dropped_BLK == dropped_BLK[:, :1]).all()
    assert int(routing.load_E.sum()) == 6 * 4 * K
    carried_E = torch.bincount(routing.expert_TK.view(-1), minlength=E)[:E]
    assert int(carried_E.max()) <= routing.most_per_expert


def test_gradients_reach_every_token_and_the_router():
    x = sequences().requires_grad_()
    router = PerSequence(inner())
    routed(router, x).weight_TK[:, 0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    assert router.router.weight_ED.grad.abs().sum() > 0


def test_replay_takes_ids_and_computes_weights():
    x = sequences()
    mask = torch.zeros(12, dtype=torch.bool)
    mask[3] = True
    router = PerSequence(inner(capacity=Capacity(factor=0.9)))
    recorded = routed(router, x, padding_mask=mask)
    with torch.no_grad():
        router.router.weight_ED.mul_(-1)
    again = routed(router, x, padding_mask=mask, routing=recorded)
    assert torch.equal(again.expert_TK, recorded.expert_TK)
    assert torch.equal(again.load_E, recorded.load_E)
    assert again.most_per_expert == recorded.most_per_expert == 3
    assert not torch.equal(again.weight_TK, recorded.weight_TK)
    assert again.weight_TK.requires_grad


def test_nothing_to_route():
    router = PerSequence(inner())
    assert routed(router, sequences(0)).expert_TK.shape == (0, K)
    assert PerTask(inner(), 2)(
        torch.zeros(0, DIM), token_ids=torch.zeros(0, dtype=torch.int64)
    ).expert_TK.shape == (0, K)


def test_noise_is_drawn_once_for_a_sequence():
    x = sequences()
    router = PerSequence(inner(noise=NormalNoise(5.0)))
    key = RandomKey.of(0, 1, torch.arange(12).view(4, 3))
    routing = routed(router, x, key=key)
    expert_BLK = routing.expert_TK.view(4, 3, K)
    assert (expert_BLK == expert_BLK[:, :1]).all()
    assert torch.equal(routed(router, x, key=key).expert_TK, routing.expert_TK)
    # A sequence's number goes with it, wherever in the batch it stands.
    back = RandomKey(key.seed, key.token_index.flip(0))
    flipped = routed(router, x.flip(0), key=back)
    assert torch.equal(flipped.expert_TK.view(4, 3, K).flip(0), expert_BLK)
    assert not torch.equal(expert_BLK, routed(router.eval(), x).expert_TK.view(4, 3, K))


def test_a_task_is_one_decision_whatever_the_tokens_hold():
    task_T = torch.tensor([0, 2, 0, 1, 2, 2])
    router = PerTask(inner(losses=(LoadBalancingLoss(coef=1.0),)), 3, seed=0, dtype=torch.float64)
    x = torch.randn(6, DIM, dtype=torch.float64)
    routing = router(x, token_ids=task_T)
    plain = router.router(router.task_GD)
    assert torch.equal(routing.expert_TK, plain.expert_TK[task_T])
    torch.testing.assert_close(routing.weight_TK, plain.weight_TK[task_T])
    assert torch.equal(routing.expert_TK, router(-x, token_ids=task_T).expert_TK)
    (routing.weight_TK[:, 0].sum() + routing.losses["balance"]).backward()
    assert (router.task_GD.grad.abs().sum(1) > 0).all()
    assert router.leaks is None
    mask = torch.arange(6) == 3
    padded = router(x, token_ids=torch.where(mask, -1, task_T), padding_mask=mask)
    assert (padded.expert_TK[3] == E).all()


def test_initial_values_follow_the_seed():
    one, two = PerTask(inner(), 3, seed=4), PerTask(inner(), 3, seed=4)
    assert torch.equal(one.task_GD, two.task_GD)
    one.reset_parameters(5)
    assert not torch.equal(one.task_GD, two.task_GD)
    assert not torch.equal(one.router.weight_ED, two.router.weight_ED)
    wrapped = PerSequence(inner())
    wrapped.reset_parameters(5)
    assert torch.equal(wrapped.router.weight_ED, one.router.weight_ED)


def layer(kind):
    losses = (LoadBalancingLoss(coef=0.1),)
    router = inner(losses=losses, capacity=Capacity(factor=1.0, order="token"))
    wrapped = PerSequence(router) if kind == "sequence" else PerTask(router, 3, seed=2)
    experts = GatedMLPExperts(DIM, 4, E, init_std=0.5, seed=1)
    return MoE(wrapped, experts).double()


def outputs(kind, part=slice(None), mesh=None):
    """Output and router gradient of this part of six sequences."""
    x = normal(3, torch.arange(6 * 4 * DIM), torch.float64).view(6, 4, DIM)
    index = torch.arange(24).view(6, 4)
    moe: nn.Module = layer(kind)
    if mesh is not None:
        moe = parallelize(moe, mesh, zero=0)
    y, routing = moe(
        x[part],
        key=RandomKey.of(0, 1, index[part]),
        token_ids=(index % 3)[part],
        return_routing=True,
    )
    y.square().sum().backward()
    grad = moe.router.router.weight_ED.grad
    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return y.detach(), grad, int(routing.num_dropped)


def on_ranks(kind):
    mesh = Mesh(edp=2)
    return outputs(kind, slice(3 * mesh.rank, 3 * mesh.rank + 3), mesh)


@pytest.mark.parametrize("kind", ["sequence", "task"])
def test_two_ranks_do_what_one_does(kind):
    y, grad, dropped = outputs(kind)
    views = run_on_ranks(2, on_ranks, kind)
    assert_close("output", torch.cat([view[0] for view in views]), y)
    for view in views:
        assert_close("router gradient", view[1], grad)
    assert sum(view[2] for view in views) == dropped > 0


def split_sequence():
    mesh = Mesh(cp=2)
    moe = parallelize(layer("sequence"), mesh, zero=0)
    moe(torch.zeros(1, 2, DIM, dtype=torch.float64))


def test_parts_of_a_sequence_are_refused():
    with pytest.raises(Exception, match="set cp=1 and tp=1"):
        run_on_ranks(2, split_sequence)


def test_bad_input():
    x = torch.zeros(6, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="PerSequence needs the length of a sequence"):
        PerSequence(inner())(x)
    with pytest.raises(ValueError, match="multiple of sequence_length=4, got 6"):
        PerSequence(inner())(x, sequence_length=4)
    with pytest.raises(ValueError, match="the balance loss cannot have scope='sequence'"):
        PerSequence(inner(losses=(LoadBalancingLoss(coef=1.0, scope="sequence"),)))
    with pytest.raises(ValueError, match="capacity cannot have scope='sequence'"):
        PerSequence(inner(capacity=Capacity(factor=1.0, scope="sequence")))
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        PerTask(inner(), 0)
    with pytest.raises(ValueError, match="init_std must be a finite number of at least 0, got -1"):
        PerTask(inner(), 2, init_std=-1.0)
    with pytest.raises(ValueError, match="give the layer token_ids"):
        PerTask(inner(), 2)(x)
    with pytest.raises(UserError, match=r"token_ids must be int64, got torch.bool"):
        PerTask(inner(), 2)(x, token_ids=torch.zeros(6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 0 to 2; raise num_tasks"):
        PerTask(inner(), 2)(x, token_ids=torch.tensor([0, 1, 2, 0, 0, 0]))
    assert "mean" in PerSequence(inner()).leaks


def hierarchical(**noises):
    return HierarchicalRouter(DIM, 4, num_groups=2, seed=0, **noises)


@pytest.mark.parametrize(
    ("router", "remedy"),
    [
        (inner(noise=NormalNoise()), "set noise=None"),
        (inner(sampling="all"), "set sampling='no'"),
        (inner(sampling="second"), "set sampling='no'"),
        (inner(skip=RandomSecond()), "set skip=None"),
        (CosineRouter(DIM, E, K, proj_dim=3, noise_std=0.1), "set noise_std=0"),
        (hierarchical(primary_noise=NormalNoise()), "set primary_noise=None and secondary_noise"),
        (hierarchical(secondary_noise=NormalNoise()), "set primary_noise=None and secondary_noise"),
        (UniformRouter(DIM, E, K), "in UniformRouter experts are drawn"),
        (ThorRouter(DIM, E), "in ThorRouter experts are drawn"),
        (PerSequence(inner(noise=NormalNoise())), "set noise=None"),
    ],
)
def test_chance_would_part_the_tokens_of_a_task(router, remedy):
    with pytest.raises(ValueError, match=f"PerTask needs a router without chance.*{remedy}"):
        PerTask(router, 2)


def test_routers_without_chance_keep_a_task_together():
    task_T = torch.arange(12) % 3
    quiet = CosineRouter(DIM, E, K, proj_dim=3, seed=0)
    for router in (inner(skip=ThresholdSecond(0.5)), quiet, hierarchical()):
        expert_TK = PerTask(router, 3, seed=0)(torch.zeros(12, DIM), token_ids=task_T).expert_TK
        assert torch.equal(expert_TK, expert_TK[:3].repeat(4, 1))


@pytest.mark.parametrize("by", ["token", "previous", "position"])
def test_tables_are_looked_up_by_tokens_alone(by):
    table = HashRouter(DIM, E, torch.arange(E), by=by)
    for wrap in (PerSequence, lambda router: PerTask(router, 3)):
        with pytest.raises(UserError, match=rf"in HashRouter a table is looked up by '{by}'; use"):
            wrap(table)


def test_one_wrapper_takes_no_other_that_looks_tasks_up():
    with pytest.raises(UserError, match=r"PerSequence needs .* in PerTask a vector is looked up"):
        PerSequence(PerTask(inner(), 3))
    assert PerSequence(inner()).looks_up is None


@pytest.mark.parametrize("make", [ExpertChoiceRouter, BatchwiseRouter])
def test_tokens_must_choose(make):
    router, x = make(DIM, E, 2.0), torch.randn(12, DIM)
    with pytest.raises(ValueError, match=f"PerTask needs .* in {make.__name__} experts do"):
        PerTask(router, 3)(x, token_ids=torch.arange(12) % 3)
    with pytest.raises(ValueError, match=f"PerSequence needs .* in {make.__name__} experts do"):
        PerSequence(router)(x, sequence_length=3)
