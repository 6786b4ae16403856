import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from expertmesh.errors import UserError
from expertmesh.experts import GatedMLPExperts, MLPExperts
from expertmesh.layer import MoE, MoELoss, moe_layers, set_loss_scale
from expertmesh.metrics import summarize
from expertmesh.routing import (
    Capacity,
    ExpertChoiceRouter,
    LoadBalancingLoss,
    NormalNoise,
    Router,
    SelectionBias,
    TopKRouter,
    ZLoss,
)
from expertmesh.testing import assert_close

D, F, E = 6, 10, 5
F64 = torch.float64


def make(k=2, *, losses="attach", shared=None, experts=None, seed=0, **options):
    router = TopKRouter(D, E, k, seed=seed, dtype=F64, init_std=0.5, **options)
    experts = experts or GatedMLPExperts(D, F, E, seed=seed, dtype=F64)
    return MoE(router, experts, losses=losses, shared=shared)


def plain(moe, x, routing):
    """The definition, token by token."""
    experts = moe.experts
    rows = []
    for t, row in enumerate(x.reshape(-1, D)):
        y = torch.zeros(D, dtype=x.dtype)
        for c, e in enumerate(routing.expert_TK[t].tolist()):
            if e < E:
                gate, up = experts.gate_up[e]
                hidden = nn.functional.silu(gate @ row) * (up @ row)
                y = y + routing.weight_TK[t, c] * (experts.down[e] @ hidden)
        rows.append(y if moe.shared is None else y + moe.shared(row))
    return torch.stack(rows).view(x.shape) if rows else x


@pytest.mark.parametrize(
    "shape", [(D,), (1, D), (7, D), (2, 5, D), (2, 1, 3, D), (0, D), (2, 0, D)]
)
@pytest.mark.parametrize(
    "options", [{}, {"renormalize": "chosen"}, {"capacity": Capacity(factor=0.6)}]
)
def test_layer_is_its_definition(shape, options):
    torch.manual_seed(0)
    moe = make(shared=nn.Linear(D, D, dtype=F64), **options)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    y, routing = moe(x, return_routing=True)
    assert y.shape == x.shape
    g = torch.randn_like(y)
    parameters = [x, *moe.parameters()]
    expected = plain(moe, x, routing)
    assert_close("y", y, expected, tol=1e-12)
    if x.numel():
        ours = torch.autograd.grad(y, parameters, g, retain_graph=True)
        theirs = torch.autograd.grad(expected, parameters, g, allow_unused=True)
        for (name, p), a, b in zip([("x", x), *moe.named_parameters()], ours, theirs, strict=True):
            assert_close(name, a, torch.zeros_like(p) if b is None else b, tol=1e-10)
    else:
        y.sum().backward()
        assert all((p.grad == 0).all() for p in moe.parameters())


def test_one_expert_with_raw_gate_is_the_expert():
    moe = MoE(
        TopKRouter(D, 1, 1, dtype=F64), MLPExperts(D, F, 1, activation="relu", seed=0, dtype=F64)
    )
    x = torch.randn(9, D, dtype=F64)
    up, down = moe.experts.up[0], moe.experts.down[0]
    assert_close("y", moe(x), (x @ up.T).relu() @ down.T, tol=1e-12)


def test_equal_experts_with_renormalised_gates_are_dense():
    moe = make(3, renormalize="chosen")
    with torch.no_grad():
        for p in moe.experts.parameters():
            p.copy_(p[:1].expand_as(p))
    x = torch.randn(9, D, dtype=F64)
    gate, up = moe.experts.gate_up[0]
    dense = (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ moe.experts.down[0].T
    assert_close("y", moe(x), dense, tol=1e-12)


def test_large_capacity_is_dropless():
    x = torch.randn(2, 9, D, dtype=F64)
    for scope in ("micro_batch", "sequence", 3):
        roomy = make(capacity=Capacity(factor=E / 1.0, scope=scope))
        assert torch.equal(roomy(x), make()(x))


def test_when_all_drop_the_layer_gives_zero():
    moe = make(1, capacity=Capacity(factor=0.01))
    x = torch.randn(20, D, dtype=F64, requires_grad=True)
    y, routing = moe(x, return_routing=True)
    assert routing.num_dropped == 20
    assert (y == 0).all()
    y.sum().backward()
    for p in moe.experts.parameters():
        assert (p.grad == 0).all()


def test_output_has_the_dtype_of_x_whatever_shared_returns():
    class Wide(nn.Module):
        def forward(self, x):
            return x.double()

    moe = MoE(TopKRouter(D, E, 2), GatedMLPExperts(D, 8, E), shared=Wide())
    assert moe(torch.randn(3, D)).dtype == torch.float32


def test_permuting_experts_leaves_the_output():
    moe = make(renormalize="chosen")
    order = torch.tensor([3, 0, 4, 1, 2])
    other = copy.deepcopy(moe)
    with torch.no_grad():
        other.router.weight_ED.copy_(moe.router.weight_ED[order])
        for p, q in zip(other.experts.parameters(), moe.experts.parameters(), strict=True):
            p.copy_(q[order])
    x = torch.randn(30, D, dtype=F64)
    assert_close("y", other(x), moe(x), tol=1e-12)


def test_permuting_tokens_permutes_outputs_if_dropless():
    x = torch.randn(30, D, dtype=F64)
    order = torch.randperm(30)
    moe = make()
    assert_close("y", moe(x[order]), moe(x)[order], tol=1e-13)
    tight = make(capacity=Capacity(factor=0.5))
    assert not torch.allclose(tight(x[order]), tight(x)[order])


def test_padding_gets_nothing_and_changes_nothing():
    moe = make(losses="attach", capacity=None)
    x = torch.randn(3, 4, D, dtype=F64)
    mask = torch.tensor([[False, False, True, True], [False] * 4, [True] * 4])
    y = moe(x, padding_mask=mask)
    assert (y[mask] == 0).all()
    assert_close("y", y[~mask], moe(x[~mask]), tol=1e-13)


def test_half_input_gives_half_output():
    moe = make().to(torch.float32)
    x = torch.randn(2, 3, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(x.bfloat16()).dtype == torch.bfloat16
    y = moe.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16


LOSSES = (LoadBalancingLoss(coef=0.5, form="megablocks"), ZLoss(coef=0.1))


def gradients(moe, loss):
    moe.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in moe.named_parameters()}


def main(y):
    return (y**2).sum()


def test_attached_and_returned_losses_train_alike():
    x = torch.randn(20, D, dtype=F64)
    attached, returned = make(losses="attach"), make(losses="return")
    for moe in (attached, returned):
        moe.router.losses = LOSSES
    a = gradients(attached, main(attached(x)))
    b = gradients(returned, main(returned(x)) + MoELoss()(returned))
    y, routing = returned(x, return_routing=True)
    c = gradients(returned, main(y) + MoELoss()([routing]))
    assert set(routing.losses) == {"balance", "z"}
    for name in a:
        assert_close(name, a[name], b[name], tol=1e-12)
        assert_close(name, a[name], c[name], tol=1e-12)
    plain_moe = make()
    bare = gradients(plain_moe, main(plain_moe(x)))
    assert not torch.allclose(a["router.weight_ED"], bare["router.weight_ED"])


def test_no_loss_is_counted_twice():
    x = torch.randn(20, D, dtype=F64)
    moe = make(losses="return")
    moe.router.losses = LOSSES
    moe(x)
    once = MoELoss()(moe)
    assert once > 0
    assert MoELoss()(moe) == 0
    _, routing = moe(x, return_routing=True)
    assert MoELoss()(moe) == 0
    assert_close("loss", MoELoss()([routing]), once, tol=1e-12)
    moe(x)
    moe(x)
    assert_close("two passes", MoELoss()(moe), 2 * once, tol=1e-12)
    checkpoint(moe, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert_close("recompute", MoELoss()(moe), once, tol=1e-12)
    moe.eval()(x)
    assert MoELoss()(moe) == 0


def test_reentrant_checkpointing_does_not_lose_losses_silently():
    x = torch.randn(20, D, dtype=F64, requires_grad=True)
    moe = make(losses="return")
    checkpoint(moe, x, use_reentrant=True).sum().backward()  # there are none to lose
    moe.router.losses = LOSSES
    y = checkpoint(moe, x, use_reentrant=True)
    with pytest.raises(ValueError, match=r"set checkpoint\(\.\.\., use_reentrant=False\)"):
        y.sum().backward()

    def returning(x):  # losses that leave the function as its outputs are in the graph
        y, routing = moe(x, return_routing=True)
        return y, MoELoss()([routing])

    y, loss = checkpoint(returning, x, use_reentrant=True)
    again = gradients(moe, main(y) + loss)
    y, loss = returning(x)
    straight = gradients(moe, main(y) + loss)
    for name, gradient in straight.items():
        assert_close(name, again[name], gradient, tol=1e-12)


def test_a_layer_is_copied_without_what_it_has_yet_to_hand_over():
    x = torch.randn(20, D, dtype=F64)
    moe = make(losses="return")
    moe.router.losses = LOSSES
    y = moe(x)
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert int(other.metrics()["tokens"].value) == 0
        assert torch.equal(other(x), y)
        assert len(other.collect_losses()) == len(LOSSES)
    assert len(moe.collect_losses()) == len(LOSSES)


def test_attaching_layers_refuse_to_be_added():
    moe = make(losses="attach")
    with pytest.raises(ValueError, match="losses='return'"):
        MoELoss()(moe)
    moe.router.losses = LOSSES
    _, routing = moe(torch.randn(4, D, dtype=F64), return_routing=True)
    assert not any(loss.requires_grad for loss in routing.losses.values())


def test_loss_scale_multiplies_the_attached_gradient_only():
    x = torch.randn(20, D, dtype=F64)
    moe = make(losses="attach")
    moe.router.losses = LOSSES
    # The router's task gradient vanishes where the output gets no gradient.
    one = gradients(moe, (moe(x) * 0).sum())["router.weight_ED"]
    set_loss_scale(nn.Sequential(moe), 0.25)
    quarter = gradients(moe, (moe(x) * 0).sum())["router.weight_ED"]
    set_loss_scale(moe, torch.tensor(1.0))
    assert_close("scaled", quarter, one / 4, tol=1e-12)


def test_the_scale_of_a_micro_batch_is_that_of_its_forward():
    x = torch.randn(20, D, dtype=F64)
    moe = make(losses="attach")
    moe.router.losses = LOSSES
    one = gradients(moe, (moe(x) * 0).sum())["router.weight_ED"]
    set_loss_scale(moe, 3.0)
    early = moe(x)
    set_loss_scale(moe, 100.0)
    late = gradients(moe, (early * 0).sum())["router.weight_ED"]
    assert_close("scale at forward", late, 3 * one, tol=1e-12)


def test_accumulation_with_shares_equals_one_batch():
    # z-loss is a mean over tokens, so shares make unequal micro-batches add up to the whole.
    x = torch.randn(20, D, dtype=F64)
    moe = make(losses="attach")
    moe.router.losses = (ZLoss(coef=0.3),)
    whole = gradients(moe, (moe(x) ** 2).sum() / 20)
    moe.zero_grad()
    for part in x.split([3, 7, 10]):
        set_loss_scale(moe, len(part) / 20)
        ((moe(part) ** 2).sum() / 20).backward()
    for name, p in moe.named_parameters():
        assert_close(name, p.grad, whole[name], tol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient_and_counts_once(reentrant):
    torch.manual_seed(0)
    moe = make(noise=NormalNoise(1.0), bias=SelectionBias(E), capacity=Capacity(factor=1.0))
    moe.router.losses = LOSSES
    x = torch.randn(4, 5, D, dtype=F64, requires_grad=True)
    torch.manual_seed(1)
    straight = gradients(moe, (moe(x) ** 2).sum())
    counted = moe.router.bias.count_E.clone()
    metrics = moe.metrics()
    moe.router.bias.count_E.zero_()
    torch.manual_seed(1)
    y = checkpoint(moe, x, use_reentrant=reentrant)
    again = gradients(moe, (y**2).sum())
    for name, gradient in straight.items():
        assert torch.equal(again[name], gradient), name
    assert torch.equal(moe.router.bias.count_E, counted)
    for name, metric in moe.metrics().items():
        assert torch.equal(metric.value, metrics[name].value), name


def test_replay_gives_the_same_output_and_router_gradient():
    x = torch.randn(4, 5, D, dtype=F64)
    moe = make(noise=NormalNoise(2.0))
    y, recorded = moe(x, return_routing=True)
    replayed, routing = moe(x, routing=recorded, return_routing=True)
    assert torch.equal(routing.expert_TK, recorded.expert_TK)
    silent = make()
    first, kept = silent(x, return_routing=True)
    second = silent(x, routing=kept)
    assert torch.equal(first, second)
    a = gradients(silent, (first**2).sum())
    b = gradients(silent, (silent(x, routing=kept) ** 2).sum())
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert replayed.shape == y.shape


def test_metrics_accumulate_and_reset():
    moe = make(capacity=Capacity(factor=0.5))
    x = torch.randn(3, 16, D, dtype=F64)
    _, routing = moe(x, return_routing=True)
    moe(x)
    summary = summarize(moe.metrics())
    assert summary.load == (2 * routing.load_E).tolist()
    assert summary.dropped == pytest.approx(float(routing.num_dropped) / 96)
    assert summarize(moe.metrics()).load == [0] * E


def test_moe_layers_finds_layers_by_name():
    model = nn.Sequential(nn.Linear(D, D), make(), nn.Sequential(make()))
    assert list(moe_layers(model)) == ["1", "2.0"]


def test_initial_values_depend_on_the_seed_alone():
    moe, other = make(seed=1), make(seed=2)
    other.reset_parameters(7)
    moe.reset_parameters(7)
    for p, q in zip(moe.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(moe.experts.down[0], moe.experts.down[1])


class EveryoneToTheFirst(Router):
    """A user's router: twelve lines."""

    def __init__(self, dim, num_experts):
        super().__init__()
        self.dim, self.num_experts, self.layer = dim, num_experts, 0

    def forward(self, x_TD, *, routing=None, **context):
        from expertmesh.routing import Routing

        expert_TK = torch.zeros(len(x_TD), 1, dtype=torch.int64)
        load_E = torch.zeros(self.num_experts, dtype=torch.int64)
        load_E[0] = len(x_TD)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_TK,
            weight_TK=torch.ones(len(x_TD), 1, dtype=x_TD.dtype),
            chosen_TK=expert_TK,
            load_E=load_E,
        )

    def reset_parameters(self, seed):
        pass


def test_a_router_of_ones_own():
    experts = GatedMLPExperts(D, F, E, seed=0, dtype=F64)
    moe = MoE(EveryoneToTheFirst(D, E), experts)
    x = torch.randn(7, D, dtype=F64)
    y, routing = moe(x, return_routing=True)
    assert_close("y", y, plain(moe, x, routing), tol=1e-12)
    assert summarize(moe.metrics()).imbalance == E


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: m(torch.randn(3, D + 1, dtype=F64)),
            r"x must have shape \(..., 6\), got \(3, 7\)",
        ),
        (lambda m: m(torch.tensor(1.0)), "x must have shape"),
        (
            lambda m: m(
                torch.randn(3, D, dtype=F64), padding_mask=torch.zeros(4, dtype=torch.bool)
            ),
            r"padding_mask must have x's shape without its width, \(3,\); got \(4,\)",
        ),
        (
            lambda m: m(torch.randn(3, D, dtype=F64), padding_mask=torch.zeros(3)),
            "padding_mask must be bool, True for padding; got torch.float32",
        ),
        (
            lambda m: m(torch.randn(3, D, dtype=F64), token_ids=torch.zeros(2, 3)),
            "token_ids must have",
        ),
        (
            lambda m: m(
                torch.randn(3, D, dtype=F64),
                routing=m(torch.randn(4, D, dtype=F64), return_routing=True)[1],
            ),
            "routing must be recorded from as many tokens as x has, 3; got 4",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


@pytest.mark.parametrize("num_tokens", [2, 4])
def test_records_of_experts_that_choose_are_of_as_many_tokens(num_tokens):
    experts = GatedMLPExperts(D, F, E, dtype=F64)
    moe = MoE(ExpertChoiceRouter(D, E, 2.0, dtype=F64), experts)
    x = torch.randn(3, D, dtype=F64)
    _, routing = moe(x, return_routing=True)
    assert moe(x, routing=routing).shape == x.shape
    with pytest.raises(ValueError, match=f"as many tokens as x has, {num_tokens}; got 3"):
        moe(torch.randn(num_tokens, D, dtype=F64), routing=routing)


def test_parts_that_do_not_fit():
    experts = GatedMLPExperts(D, F, E)
    with pytest.raises(ValueError, match="agree on num_experts: the router has 4, the experts 5"):
        MoE(TopKRouter(D, 4, 2), experts)
    with pytest.raises(UserError, match=r"instance of Router, got GatedMLPExperts.*MoE\(router"):
        MoE(experts, TopKRouter(D, E, 2))
    with pytest.raises(UserError, match=r"experts must be an instance of Experts, got Linear"):
        MoE(TopKRouter(D, E, 2), torch.nn.Linear(D, D))
    with pytest.raises(ValueError, match="agree on dim: the router has 8, the experts 6"):
        MoE(TopKRouter(8, E, 2), experts)
    with pytest.raises(ValueError, match="losses must be 'attach' or 'return'"):
        MoE(TopKRouter(D, E, 2), experts, losses="add")
