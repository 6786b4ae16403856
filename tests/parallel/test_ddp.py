"""DDP round experts that are dealt out, against DDP's own rule in one process.

The rule: the gradient is the mean of the ranks' gradients of their own losses; balance losses,
which are over all tokens, count once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from expertmesh.dispatch.collectives import all_gather
from expertmesh.errors import UserError
from expertmesh.experts import Experts, HeterogeneousExperts, ModuleExperts
from expertmesh.layer import MoE, set_loss_scale
from expertmesh.parallel.clip import clip_grad_norm_
from expertmesh.parallel.ddp import ddp, param_groups
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import FixedRouter, SelectionBias
from expertmesh.shards import Shard, is_sharded, local
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from tests.parallel.user_model import (
    EXPERTS,
    UserModel,
    gradient_pieces,
    moe_of,
    own_tokens,
    tokens,
)

SIZES = (12, 8)
"""Tokens of each micro-batch on all ranks; equal parts, so that means of means are means."""


def net(degrees: dict[str, Any]) -> UserModel:
    return UserModel(("gated",) if "etp" in degrees else ("gated", "module"))


def backward(model: nn.Module, mesh: Mesh, place: int, share: float = 1.0) -> None:
    """A local mean loss of one micro-batch."""
    start, number = sum(SIZES[:place]), SIZES[place]
    own = own_tokens(mesh, number)
    set_loss_scale(model, share)
    x_TD = tokens(number, start)[own]
    key = RandomKey.of(0, 1, torch.arange(start, start + number)[own])
    y_TD = model(x_TD, key)
    ((y_TD * torch.sin(3 * x_TD)).sum(dim=1).mean() * share).backward()


WAYS = ("no_sync", "again")
"""Two micro-batches are brought together at the second, or at each."""


def accumulated(degrees: dict[str, Any], options: dict[str, Any]) -> list[dict[str, Shard]]:
    mesh = Mesh(**degrees)
    return [_accumulated(degrees, mesh, way, options) for way in WAYS]


def _accumulated(
    degrees: dict[str, Any], mesh: Mesh, way: str, options: dict[str, Any]
) -> dict[str, Shard]:
    model: nn.Module = net(degrees)
    if mesh.world > 1:
        model = ddp(model, mesh, **options)
    if way == "no_sync" and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            backward(model, mesh, 0, 0.5)
    else:
        backward(model, mesh, 0, 0.5)
    backward(model, mesh, 1, 0.5)
    found = gradient_pieces(model)
    return {name.removeprefix("module."): piece for name, piece in found.items()}


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ({"ep": 2}, {}),
        ({"ep": 4}, {"gradient_as_bucket_view": True}),
        ({"ep": 2, "etp": 2}, {}),
        ({"edp": 4}, {"broadcast_buffers": False}),
    ],
    ids=str,
)
def test_gradients_are_the_mean_of_the_ranks_own(
    degrees: dict[str, Any], options: dict[str, Any]
) -> None:
    by_rank = run_on_ranks(4, accumulated, degrees, options)
    kinds = {"etp": 1} if "etp" in degrees else {}
    for views, alone in zip(zip(*by_rank, strict=True), accumulated(kinds, {}), strict=True):
        got, expected = assemble(views), assemble([alone])
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(name, got[name], gradient)


def trained(degrees: dict[str, Any]) -> dict[str, Any]:
    """Three steps of Adam with clipping, then what this rank has."""
    mesh = Mesh(**degrees)
    model: nn.Module = net(degrees)
    if mesh.world > 1:
        model = ddp(model, mesh)
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.05)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        backward(model, mesh, step % 2)
        norms.append(float(clip_grad_norm_(model, 0.5, mesh)))
        optimizer.step()
    copies = [
        all_gather(local(p).detach().reshape(1, -1), mesh.group("edp"))
        for p in model.parameters()
        if is_sharded(p)
    ]
    return {
        "norms": norms,
        "copies differ": any(bool((c != c[0]).any()) for c in copies),
        "parameters": pieces((n.removeprefix("module."), p) for n, p in model.named_parameters()),
    }


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"ep": 2, "placement": "outside"}], ids=str)
def test_training_is_that_of_one_process_and_copies_stay_equal(degrees: dict[str, Any]) -> None:
    views = run_on_ranks(4, trained, degrees)
    expected = trained({})
    assert not any(view["copies differ"] for view in views)
    for view in views:
        assert view["norms"] == pytest.approx(expected["norms"], rel=1e-12)
    got = assemble([view["parameters"] for view in views])
    for name, shard in expected["parameters"].items():
        assert_close(name, got[name], shard.local, 1e-10)


def averaged() -> tuple[list[Tensor], list[Tensor], bool]:
    """A running average after two updates, the weights' means, and whether it runs by itself."""
    mesh = Mesh(ep=2)
    model = ddp(net({}), mesh)
    backward(model, mesh, 0)
    average = AveragedModel(model.module, avg_fn=get_ema_avg_fn(0.25))
    average.update_parameters(model)
    starts = [local(param).detach().clone() for param in model.parameters()]
    with torch.no_grad():
        for param in model.parameters():
            local(param).add_(1)
    average.update_parameters(model)
    expected = [start + 0.75 for start in starts]
    got = [local(param).detach() for param in average.module.parameters()]
    key = RandomKey.of(0, 1, torch.arange(3))
    x_TD = tokens(3, 0)
    return got, expected, not torch.equal(average(x_TD, key), model(x_TD, key))


def test_a_running_average_is_a_copy_that_runs_over_the_same_ranks() -> None:
    for got, expected, runs in run_on_ranks(2, averaged, timeout=30):
        assert runs
        for place, (mean, wanted) in enumerate(zip(got, expected, strict=True)):
            assert_close(f"parameter {place}", mean, wanted)


def own_counts() -> tuple[list[int], Tensor]:
    """Counters of selection bias after forward passes, beside this rank's choices."""
    mesh = Mesh(ep=2)
    moe = moe_of(bias=SelectionBias(EXPERTS, rate=0.1))
    model = ddp(moe, mesh)
    counted = torch.zeros(EXPERTS, dtype=torch.int64)
    for place in range(2):
        x_TD = tokens(8, place)[own_tokens(mesh, 8)]
        _, routing = model(x_TD, return_routing=True)
        counted += routing.load_E
    bias = moe.router.bias
    assert isinstance(bias, SelectionBias)
    return counted.tolist(), bias.count_E


def test_counters_stay_each_ranks_own() -> None:
    views = run_on_ranks(2, own_counts)
    for own, counter in views:
        assert counter.tolist() == own
    assert views[0][0] != views[1][0]


def idle_and_bare() -> list[bool]:
    """A bare layer as root, one rank without tokens; every parameter has a gradient, twice."""
    mesh = Mesh(ep=2)
    model = ddp(moe_of(), mesh)
    found = []
    for number in (0, 5):
        own = number if mesh.rank == 0 else 3
        model(tokens(own, 0)).sum().backward()
        found.append(all(p.grad is not None for p in model.parameters()))
    return found


def test_a_bare_layer_and_a_rank_without_tokens() -> None:
    assert run_on_ranks(2, idle_and_bare, timeout=30) == [[True, True]] * 2


class Busy(nn.Module):
    """A dense layer, and experts of which each rank uses its own."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.moe = MoE(FixedRouter(4, 3), experts)
        self.double()

    def forward(self, x_TD: Tensor, used: tuple[int, ...]) -> Tensor:
        x_TD = self.first(x_TD)
        if not used:
            return x_TD
        router = self.moe.router
        assert isinstance(router, FixedRouter)
        router.experts, router.k = used, len(used)
        y_TD: Tensor = x_TD + self.moe(x_TD)
        return y_TD


def busy(kind: str) -> Busy:
    torch.manual_seed(0)
    linear = partial(nn.Linear, 4, 4)
    if kind == "module":
        return Busy(ModuleExperts(linear, 3, dim=4, seed=1))
    return Busy(HeterogeneousExperts((linear() for _ in range(3)), dim=4))


Pass = tuple[int, tuple[int, ...]]
"""Tokens of a rank in a pass, and the experts that it uses; without any the layer is left out."""

PASSES: dict[str, list[list[Pass]]] = {
    "of_choices": [[(5, (0, 1))], [(5, (0, 2))]],
    "a_rank_without_tokens": [[(5, (0, 1))], [(0, (0, 1))]],
    "two_under_no_sync": [[(3, (1, 0)), (5, (2, 1))], [(5, (0, 2)), (0, (0, 2))]],
    "a_layer_left_out_by_one": [[(5, (0, 1))], [(5, ())]],
    "a_layer_left_out_by_all": [[(5, ())], [(5, ())]],
}


def run_pass(model: nn.Module, rank: int, place: int, turn: Pass) -> None:
    number, used = turn
    x_TD = torch.linspace(-1, 2, number * 4, dtype=torch.float64).view(number, 4)
    (model(x_TD + rank + 2 * place, used) ** 2).sum().backward()


Gradients = dict[str, Tensor | None]


def brought_together(kind: str, by_rank: Sequence[Sequence[Pass]]) -> Gradients:
    mesh = Mesh()
    model = busy(kind)
    *first, last = by_rank[mesh.rank]
    wrapped = ddp(model, mesh, find_unused_parameters=not last[1] or not by_rank[1][-1][1])
    for place, turn in enumerate(first):
        with wrapped.no_sync():
            run_pass(wrapped, mesh.rank, place, turn)
    run_pass(wrapped, mesh.rank, len(first), last)
    return {name: param.grad for name, param in model.named_parameters()}


def mean_of_processes(kind: str, by_rank: Sequence[Sequence[Pass]]) -> Gradients:
    model = busy(kind)
    for rank, passes in enumerate(by_rank):
        for place, turn in enumerate(passes):
            run_pass(model, rank, place, turn)
    return {
        name: None if param.grad is None else param.grad / len(by_rank)
        for name, param in model.named_parameters()
    }


@pytest.mark.parametrize("kind", ["heterogeneous", "module"])
@pytest.mark.parametrize("passes", PASSES)
def test_whichever_experts_are_idle_on_a_rank(kind: str, passes: str) -> None:
    expected = mean_of_processes(kind, PASSES[passes])
    for got in run_on_ranks(2, brought_together, kind, PASSES[passes], timeout=30):
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (got[name] is None) == (gradient is None), name
            if gradient is not None:
                assert_close(name, got[name], gradient)


def on_some_ranks() -> Tensor | None:
    """Two ranks of three train; the third is done."""
    mesh = Mesh(ranks=[0, 2])
    if not mesh.member:
        return None
    model = busy("heterogeneous")
    run_pass(ddp(model, mesh), mesh.everyone.index, 0, (5, (0, 1 + mesh.everyone.index)))
    return model.first.weight.grad


def test_a_mesh_of_some_ranks_waits_for_no_others() -> None:
    first, outside, last = run_on_ranks(3, on_some_ranks, timeout=30)
    expected = mean_of_processes("heterogeneous", [[(5, (0, 1))], [(5, (0, 2))]])["first.weight"]
    assert outside is None
    for got in (first, last):
        assert_close("first.weight", got, expected)


def refusals() -> list[str]:
    messages = []
    attempts: list[tuple[dict[str, Any], nn.Module]] = [
        ({"tp": 2}, moe_of()),
        ({"pp": 2}, moe_of()),
        ({"etp": 2}, moe_of("module")),
        ({"ranks": [0]}, moe_of()),
    ]
    for degrees, model in attempts:
        mesh = Mesh(**degrees)
        with pytest.raises(UserError) as caught:
            ddp(model, mesh)
        messages.append(str(caught.value))
    return messages


def test_what_ddp_cannot_do_is_refused() -> None:
    tensor, pipeline, sliced, alone = run_on_ranks(2, refusals)[0]
    assert "got a mesh with tp above 1; use expertmesh.parallelize" in tensor
    assert "got a mesh with pp above 1" in pipeline
    assert "ModuleExperts cannot be cut into hidden slices" in sliced
    assert "DDP needs several processes, got a mesh of one; start with torchrun" in alone


def test_groups_for_an_optimizer_hold_every_parameter_once() -> None:
    model = UserModel()
    (group,) = param_groups(model)
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
