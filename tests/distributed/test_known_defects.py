"""What went wrong in other systems when MoE layers met several ranks, each as a test.

The list is drawn from the code and the issue threads of ColossalAI (its MoE modules and OpenMoE
example), DeepSpeed, Tutel and FastMoE.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.metrics import Metric
from expertmesh.parallel.clip import clip_grad_norm_
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.grid import Grid
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import Capacity, LoadBalancingLoss, SelectionBias, ZLoss
from expertmesh.shards import local, shard_of
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from tests.distributed.layers import (
    HIDDEN,
    Seen,
    alone,
    assert_same,
    gradients_of,
    layer,
    on_mesh,
    own_slice,
    pass_through,
    tokens,
)

EP2: dict[str, int] = {"ep": 2}


# Dispatch: the right rows at the right experts, all of them.


def with_telling_experts(axes: dict[str, int]) -> Tensor:
    """Each expert answers with its own number, whatever it is given."""
    moe = layer(num_experts=8, k=1)
    with torch.no_grad():
        # silu(gate) * up is 1 in the first hidden unit for every token with a first entry of 1.
        moe.experts.gate_up.zero_()
        moe.experts.down.zero_()
        moe.experts.gate_up[:, 0, :, 0] = 1.0
        moe.experts.gate_up[:, 1, :, 0] = 1.0 / torch.nn.functional.silu(torch.tensor(1.0).double())
        moe.experts.down[:, 0, :] = torch.arange(8.0)[:, None] / HIDDEN
    mesh = Mesh(**axes)
    parallelize(moe, mesh)
    x_TD = tokens(32)
    x_TD[:, 0] = 1.0
    x_TD = x_TD[own_slice(mesh, 32)]
    y_TD, routing = moe(x_TD, return_routing=True)
    answered_T = y_TD[:, 0] / routing.weight_TK[:, 0]
    return torch.stack([answered_T, routing.expert_TK[:, 0].double()])


@pytest.mark.parametrize("axes", [{"ep": 2}, {"ep": 4}, {"ep": 2, "etp": 2}])
def test_a_rank_with_several_experts_gives_each_its_own_tokens(axes: dict[str, int]) -> None:
    answered_T, wanted_T = torch.cat(run_on_ranks(4, with_telling_experts, axes), dim=1)
    assert len(set(wanted_T.tolist())) > 4
    assert_close("number of the expert that answered", answered_T, wanted_T)


CAPACITY = {"num_experts": 8, "k": 2, "capacity": Capacity(factor=0.6)}


@pytest.mark.parametrize("axes", [{}, {"ep": 4}])
def test_more_ranks_drop_no_other_tokens(axes: dict[str, int]) -> None:
    expected = alone(40, CAPACITY)
    assert expected.dropped > 8
    assert_same(run_on_ranks(4, on_mesh, axes, 40, None, 2, CAPACITY), expected)


@pytest.mark.parametrize("k", [2, 3])
def test_dropless_routing_drops_nothing_on_one_rank_or_two(k: int) -> None:
    options = {"num_experts": 8, "k": k, "renormalize": "chosen"}
    expected = alone(24, options)
    views = run_on_ranks(2, on_mesh, EP2, 24, None, 2, options)
    assert sum(int(view.load_E.sum()) for view in views) == 24 * k
    assert_same(views, expected)


@pytest.mark.parametrize("sizes", [[1, 0], [2, 1], [3, 4], [13, 6], [0, 5]])
def test_every_number_of_tokens_will_do(sizes: list[int]) -> None:
    count = sum(sizes)
    assert_same(run_on_ranks(2, on_mesh, EP2, count, sizes), alone(count))


def test_ranks_with_different_numbers_of_tokens_do_not_wait_forever() -> None:
    assert_same(run_on_ranks(4, on_mesh, EP2, 17, [0, 11, 1, 5], timeout=30), alone(17))


def test_capacity_may_exceed_the_tokens() -> None:
    options = {"num_experts": 4, "k": 2, "capacity": Capacity(factor=100.0)}
    expected = alone(2, options)
    assert expected.dropped == 0
    assert_same(run_on_ranks(2, on_mesh, EP2, 2, None, 2, options), expected)


def test_choices_are_dropped_by_probability_and_not_by_logit() -> None:
    # Three choices a token, of which the slots hold two thirds: nearly all slots must be used.
    options = {"num_experts": 4, "k": 3, "capacity": Capacity(factor=2 / 3, order="probability")}
    expected = alone(32, options)
    kept = 32 * 3 - expected.dropped
    assert kept >= 0.9 * 4 * 16
    assert_same(run_on_ranks(2, on_mesh, EP2, 32, None, 2, options), expected)


def with_selection_bias(axes: dict[str, int], count: int) -> Seen:
    moe = layer(num_experts=8, k=2, score="sigmoid", bias=SelectionBias(8, rate=0.0))
    with torch.no_grad():
        moe.router.bias.bias_E[3] = 10.0
    mesh = Mesh(**axes)
    return pass_through(parallelize(moe, mesh), mesh, count)


def test_a_selection_bias_is_not_lost_on_the_way_to_other_ranks() -> None:
    views = run_on_ranks(2, with_selection_bias, EP2, 20)
    assert sum(int(view.load_E[3]) for view in views) == 20
    assert_same(views, with_selection_bias({}, 20))


def in_evaluation(axes: dict[str, int], count: int) -> Tensor:
    mesh = Mesh(**axes)
    moe = parallelize(layer(), mesh).eval()
    with torch.no_grad():
        return moe(tokens(count)[own_slice(mesh, count)])


def test_inference_takes_the_number_of_ranks_from_the_mesh_and_not_from_the_experts() -> None:
    y_TD = torch.cat(run_on_ranks(2, in_evaluation, EP2, 11))
    assert_close("output", y_TD, in_evaluation({}, 11))


def test_more_ranks_than_experts_share_them() -> None:
    options = {"num_experts": 2, "k": 2}
    expected = alone(12, options)
    for axes in ({"ep": 2}, {"ep": 2, "etp": 2}, {"etp": 4}):
        assert_same(run_on_ranks(4, on_mesh, axes, 12, None, 2, options), expected)


def refusal(axes: dict[str, int], num_experts: int) -> str:
    with pytest.raises(UserError) as caught:
        parallelize(layer(num_experts=num_experts), Mesh(**axes))
    return str(caught.value)


def test_experts_that_cannot_be_dealt_out_are_refused_with_what_would_work() -> None:
    for message in run_on_ranks(4, refusal, {"ep": 4}, 6):
        assert re.search(r"ep=4 for 6 experts; set ep to one of \[1, 2\]", message), message


def bytes_sent(axes: dict[str, int]) -> int:
    mesh = Mesh(**axes)
    moe = parallelize(layer(), mesh)
    pass_through(moe, mesh, 16)
    return sum(mesh.group(("ep", "etp")).traffic.bytes_sent.values())


def test_experts_that_are_all_here_cost_no_all_to_all() -> None:
    assert run_on_ranks(2, bytes_sent, {"edp": 2}) == [0, 0]
    assert min(run_on_ranks(2, bytes_sent, EP2)) > 0


# Gradients: complete, of one scale, counted once.

MESHES_OF_4 = [{"edp": 4}, {"ep": 2}, {"ep": 4}, {"ep": 2, "etp": 2}, {"edp": 2, "etp": 2}]


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("axes", MESHES_OF_4, ids=str)
def test_the_scale_of_expert_gradients_does_not_depend_on_the_mesh(
    axes: dict[str, int], zero: int
) -> None:
    assert_same(run_on_ranks(4, on_mesh, axes, 21, None, zero), alone(21))


def after_steps(axes: dict[str, int], zero: int) -> Any:
    mesh = Mesh(**axes)
    moe = parallelize(layer(), mesh, zero=zero)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        pass_through(moe, mesh, 10, [6, 0, 3, 1] if mesh.world > 1 else None)
        optimizer.step()
    return pieces(moe.named_parameters())


@pytest.mark.parametrize("zero", [0, 1])
def test_copies_of_an_expert_stay_the_same_to_the_bit(zero: int) -> None:
    # `assemble` refuses copies that differ; in stage 0 every rank has whole copies.
    got = assemble(run_on_ranks(4, after_steps, {"ep": 2, "edp": 2}, zero))
    for name, expected in assemble([after_steps({}, zero)]).items():
        assert_close(name, got[name], expected)


def only_expert_0(axes: dict[str, int], zero: int) -> dict[str, Any]:
    mesh = Mesh(**axes)
    moe = parallelize(layer(k=1, bias=SelectionBias(8, rate=0.0)), mesh, zero=zero)
    moe.router.bias.bias_E[0] = 100.0
    seen = pass_through(moe, mesh, 9)
    assert all(p.grad is not None for p in moe.parameters())
    return seen.gradients


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_expert_without_tokens_has_a_gradient_of_zero_and_stops_nobody(zero: int) -> None:
    gradients = assemble(run_on_ranks(4, only_expert_0, {"ep": 2}, zero, timeout=30))
    assert gradients["experts.down"][0].norm() > 0
    assert gradients["experts.down"][1:].norm() == 0
    expected = assemble([only_expert_0({}, zero)])
    assert_close("gate_up", gradients["experts.gate_up"], expected["experts.gate_up"])


def made_up_norm(axes: dict[str, int]) -> float:
    """Every element of every gradient is 1."""
    mesh = Mesh(**axes)
    moe = parallelize(layer(), mesh)
    pass_through(moe, mesh, 8)
    for param in moe.parameters():
        assert param.grad is not None
        local(param.grad).fill_(1.0)
    return float(clip_grad_norm_(moe, 1.0, mesh))


@pytest.mark.parametrize("axes", MESHES_OF_4, ids=str)
def test_the_norm_counts_each_parameter_once(axes: dict[str, int]) -> None:
    elements = sum(p.numel() for p in layer().parameters())
    assert run_on_ranks(4, made_up_norm, axes) == pytest.approx([elements**0.5] * 4, rel=1e-12)


BALANCED = {
    "num_experts": 8,
    "k": 2,
    "losses": (LoadBalancingLoss(coef=0.5), ZLoss(coef=0.1)),
}


def test_balance_losses_weigh_the_same_on_any_number_of_ranks() -> None:
    expected = alone(19, BALANCED)
    without = alone(19, {"num_experts": 8, "k": 2})
    router = "router.weight_ED"
    difference = gradients_of([expected])[router] - gradients_of([without])[router]
    assert difference.norm() > 0.1 * gradients_of([without])[router].norm()
    assert_same(run_on_ranks(4, on_mesh, EP2, 19, None, 2, BALANCED), expected)


def with_padding(axes: dict[str, int], count: int) -> dict[str, Any]:
    """The last third of all tokens is padding; some ranks have nothing else."""
    mesh = Mesh(**axes)
    moe = parallelize(layer(**BALANCED, capacity=Capacity(factor=0.7)), mesh)
    own = own_slice(mesh, count)
    padding_T = torch.arange(count)[own] >= count - count // 3
    x_TD = torch.where(padding_T[:, None], 1e6, tokens(count)[own])
    key = RandomKey.of(3, 1, torch.arange(count)[own])
    y_TD, routing = moe(x_TD, padding_mask=padding_T, key=key, return_routing=True)
    y_TD.masked_fill(padding_T[:, None], 0.0).square().sum().backward()
    assert y_TD.isfinite().all()
    assert int(routing.dropped_TK[padding_T].sum()) == 0
    assert (routing.expert_TK[padding_T] == 8).all()
    return pieces((name, p.grad) for name, p in moe.named_parameters() if p.grad is not None)


def test_padding_takes_no_slot_and_enters_no_loss_on_any_rank() -> None:
    got = assemble(run_on_ranks(4, with_padding, EP2, 18))
    for name, expected in assemble([with_padding({}, 18)]).items():
        assert_close(name, got[name], expected)


def in_bfloat16(axes: dict[str, int]) -> tuple[set[torch.dtype], float]:
    """A step much smaller than bfloat16's resolution of the weights."""
    mesh = Mesh(**axes)
    moe = parallelize(layer().float(), mesh)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-6, weight_decay=0.0)
    before = local(moe.experts.down).detach().clone()
    x_TD = tokens(64).float()[own_slice(mesh, 64)]
    with torch.autocast("cpu", torch.bfloat16):
        moe(x_TD).square().sum().backward()
    optimizer.step()
    moved = (local(moe.experts.down).detach() != before).float().mean()
    return {p.dtype for p in moe.parameters()}, float(moved)


def test_experts_have_float32_masters_under_bfloat16() -> None:
    for dtypes, moved in run_on_ranks(2, in_bfloat16, EP2):
        assert dtypes == {torch.float32}
        assert moved > 0.95


# State: initial values, several meshes, telemetry, options.


def initial_values(axes: dict[str, int], seed: int) -> dict[str, Any]:
    with torch.device("meta"):
        model = nn.Sequential(layer(), layer())
    mesh = Mesh(**axes)
    parallelize(model, mesh)
    model.to_empty(device="cpu")
    for index, moe in enumerate(model):
        moe.reset_parameters(seed + index)
    whole = sum(p.numel() for p in layer().experts.parameters()) * 2
    held = sum(shard_of(p).local.numel() for moe in model for p in moe.experts.parameters())
    assert held == whole // mesh.stage.size  # never all experts on one rank
    return pieces(model.named_parameters())


def test_experts_start_different_by_rank_layer_and_seed_and_as_in_one_process() -> None:
    values = assemble(run_on_ranks(4, initial_values, {"ep": 4}, 5))
    down = torch.cat([values["0.experts.down"], values["1.experts.down"]]).flatten(1)
    distance = torch.cdist(down, down) + torch.eye(len(down)) * 9
    assert distance.min() > 0.5
    for name, expected in assemble([initial_values({}, 5)]).items():
        assert torch.equal(values[name], expected), name
    other = assemble([initial_values({}, 6)])
    assert not torch.equal(other["0.experts.down"], values["0.experts.down"])


def two_meshes(count: int) -> tuple[Seen, Seen]:
    """Two models, each with a mesh of its own, used in turns."""
    meshes = Mesh(ep=2), Mesh(etp=2)
    models = [parallelize(layer(), meshes[0], zero=3), parallelize(layer(), meshes[1], zero=0)]
    for moe, mesh in zip(models, meshes, strict=True):
        moe.eval()
        moe(tokens(count)[own_slice(mesh, count)])
        moe.train()
    first, second = (pass_through(m, mesh, count) for m, mesh in zip(models, meshes, strict=True))
    return first, second


def test_two_models_with_two_meshes_live_in_one_process() -> None:
    pairs = run_on_ranks(2, two_meshes, 9)
    for views in zip(*pairs, strict=True):
        assert_same(views, alone(9))


def counted(axes: dict[str, int], rows: int, seq_len: int) -> dict[str, Metric]:
    mesh = Mesh(**axes)
    moe = parallelize(layer(**CAPACITY), mesh)
    own = own_slice(mesh, rows)
    moe(tokens(rows * seq_len).view(rows, seq_len, -1)[own])
    return moe.metrics()


def test_telemetry_adds_up_to_that_of_one_process() -> None:
    by_rank = run_on_ranks(4, counted, EP2, 8, 16)
    expected = counted({}, 8, 16)
    assert int(expected["dropped"].value.sum()) > 20
    for name, metric in expected.items():
        values = torch.stack([metrics[name].value for metrics in by_rank])
        total = values.sum(0) if metric.reduce == "sum" else values.amax(0)
        torch.testing.assert_close(total, metric.value, rtol=1e-6, atol=1e-6)


def stored(zero: int) -> tuple[int, int]:
    """Elements held before a forward pass, and after it."""
    mesh = Mesh(edp=2)
    moe = parallelize(layer(), mesh, zero=zero)
    before = sum(local(p).numel() for p in moe.experts.parameters())
    moe(tokens(4))
    return before, sum(local(p).numel() for p in moe.experts.parameters())


def test_no_option_of_the_mesh_does_nothing() -> None:
    assert Grid.infer(4, ep=2, placement="inside").groups("ep") == [[0, 1], [2, 3]]
    assert Grid.infer(4, ep=2, placement="outside").groups("ep") == [[0, 2], [1, 3]]
    whole = sum(p.numel() for p in layer().experts.parameters())
    found = {zero: run_on_ranks(2, stored, zero)[0] for zero in (0, 2, 3)}
    assert found[0] == (whole, whole)
    assert found[2] == (whole // 2, whole)
    assert found[3] == (whole // 2, whole // 2)
