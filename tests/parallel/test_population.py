"""Statistics over ranks against those of all tokens in one place."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.dispatch.collectives import Group, split_sizes
from expertmesh.errors import UserError
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.population import RankPopulation
from expertmesh.random import RandomKey, normal
from expertmesh.routing import (
    Capacity,
    ImportanceLoss,
    LoadBalancingLoss,
    Routing,
    SelectionBias,
    TopKRouter,
    ZLoss,
    update_selection_bias,
)
from expertmesh.routing.capacity import DropOrder
from expertmesh.routing.scope import Scope
from expertmesh.testing import assert_close, run_on_ranks

DIM, EXPERTS, ROWS, LENGTH = 6, 4, 4, 6
WHOLE = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)


def of(mesh: Mesh, averaged: int = 1) -> RankPopulation:
    return RankPopulation(mesh.stage, mesh.group(("cp", "tp")), averaged=averaged)


def own_positions(mesh: Mesh, length: int = LENGTH) -> Tensor:
    """Indices of this rank's tokens, ``(rows, positions)``: rows over dp, slices over (cp, tp)."""
    part = WHOLE[:, :length]
    for group, dim in ((mesh.group("dp"), 0), (mesh.group(("cp", "tp")), 1)):
        sizes = split_sizes(part.shape[dim], group.size)
        part = part.narrow(dim, sum(sizes[: group.index]), sizes[group.index])
    return part


def values(index: Tensor) -> Tensor:
    """``(..., D)`` by token."""
    flat = index.reshape(-1, 1) * DIM + torch.arange(DIM)
    return normal(5, flat, torch.float64).view(*index.shape, DIM)


def arranged(degrees: dict[str, Any], length: int) -> dict[str, Tensor]:
    mesh = Mesh(**degrees)
    index_BS = own_positions(mesh, length)
    key = RandomKey.of(0, 1, index_BS)
    order = of(mesh).arrange(index_BS.numel(), index_BS.shape[1], key)
    own_TD = values(index_BS).flatten(0, 1)
    whole_ND = order.whole(own_TD)
    assert not whole_ND.requires_grad
    assert order.num_tokens == ROWS * length
    assert order.sequence_length == length
    assert torch.equal(order.own(whole_ND), own_TD)
    sums = {f"sums of {n}": order.group_sums(own_TD, n) for n in (2, length, ROWS * length)}
    return {"whole": whole_ND, **sums}


@pytest.mark.parametrize("length", [6, 2])
@pytest.mark.parametrize("degrees", [{}, {"cp": 2}, {"cp": 2, "tp": 2}, {"tp": 4}], ids=str)
def test_all_tokens_are_put_in_the_batchs_order(degrees: dict[str, Any], length: int) -> None:
    views = run_on_ranks(4, arranged, degrees, length)
    whole_ND = values(WHOLE[:, :length]).flatten(0, 1)
    for view in views:
        assert torch.equal(view["whole"], whole_ND)
    for name in views[0]:
        if name != "whole":
            size = int(name.split()[-1])
            expected = whole_ND.view(-1, size, DIM).sum(dim=1)
            assert_close(name, sum((v[name] for v in views), torch.zeros_like(expected)), expected)


def without_key() -> tuple[Tensor, str]:
    mesh = Mesh()
    count = (3, 0, 5)[mesh.rank]
    start = (0, 3, 3)[mesh.rank]
    order = of(mesh).arrange(count, None, None)
    own = values(torch.arange(start, start + count))
    whole = order.whole(own)
    assert torch.equal(order.own(whole), own)
    assert order.sequence_length is None
    sliced = Mesh(cp=3)
    with pytest.raises(UserError) as caught:
        of(sliced).arrange(count, count, None)
    return whole, str(caught.value)


def test_without_a_key_ranks_follow_each_other_and_slices_are_refused() -> None:
    for whole, message in run_on_ranks(3, without_key):
        assert torch.equal(whole, values(torch.arange(8)))
        assert "give key=RandomKey(seed, token_index)" in message


def totals() -> dict[str, Tensor]:
    mesh = Mesh(cp=2)
    population = of(mesh, averaged=3)
    addend = torch.full((2,), float(mesh.rank + 1), requires_grad=True)
    found = {"total": population.total(addend, copies=2)}
    (found["gradient"],) = torch.autograd.grad(found["total"].sum(), addend)
    (found["for training"],) = torch.autograd.grad(population.for_training(addend).sum(), addend)
    rows = 0 if mesh.rank == 1 else 2  # whose slice of the sequences is empty
    part_BX = torch.full((rows, 1), float(mesh.rank + 1), requires_grad=True)
    found["sequence"] = population.sequence_total(part_BX)
    (found["sequence gradient"],) = torch.autograd.grad(found["sequence"].sum(), part_BX)
    return {name: tensor.detach() for name, tensor in found.items()}


def test_sums_and_their_gradients() -> None:
    for rank, found in enumerate(run_on_ranks(4, totals)):
        assert found["total"].tolist() == [10.0] * 2
        assert found["gradient"].tolist() == [2.0] * 2
        assert found["for training"].tolist() == [3.0] * 2
        assert found["sequence"].tolist() == [[1.0]] * 2 if rank < 2 else [[7.0]] * 2
        assert found["sequence gradient"].tolist() == [[1.0]] * (0 if rank == 1 else 2)


def test_a_loss_is_left_alone_where_gradients_are_summed() -> None:
    loss = torch.ones((), requires_grad=True)
    assert RankPopulation(Group.alone(), Group.alone()).for_training(loss) is loss


# Routers over ranks: the same decisions, losses and gradients.


def router(order: DropOrder, scope: Scope) -> TopKRouter:
    return TopKRouter(
        DIM,
        EXPERTS,
        2,
        init_std=1.0,
        seed=0,
        capacity=Capacity(factor=0.7, order=order, scope=scope),
        bias=SelectionBias(EXPERTS, rate=0.1),
        losses=(
            LoadBalancingLoss(coef=1.0, scope=scope),
            ImportanceLoss(coef=1.0, of="probabilities", scope=scope),
            ZLoss(coef=1.0),
        ),
    ).double()


def routed(mesh: Mesh, order: DropOrder, scope: Scope) -> dict[str, Any]:
    decides = router(order, scope)
    if mesh.world > 1:
        decides.population = of(mesh)
    index_BS = own_positions(mesh)
    padding_BS = index_BS % 7 == 3
    decided: Routing = decides(
        values(index_BS).flatten(0, 1),
        padding_mask=padding_BS.flatten(),
        sequence_length=index_BS.shape[1],
        key=RandomKey.of(0, 1, index_BS),
    )
    torch.stack(list(decided.losses.values())).sum().backward()
    update_selection_bias(decides, lambda counts: of(mesh).total(counts))
    assert decides.bias is not None
    return {
        "index": index_BS.flatten(),
        "expert": decided.expert_TK,
        "losses": {name: float(loss.detach()) for name, loss in decided.losses.items()},
        "gradient": decides.weight_ED.grad,
        "bias": decides.bias.bias_E,
        "most": decided.most_per_expert,
    }


CASES: list[tuple[DropOrder, Scope]] = [
    ("position", "micro_batch"),
    ("token", 8),
    ("priority", "sequence"),
    ("probability", 12),
    ("random", "micro_batch"),
]


def all_cases(degrees: dict[str, Any]) -> list[dict[str, Any]]:
    mesh = Mesh(**degrees)
    return [routed(mesh, order, scope) for order, scope in CASES]


@pytest.mark.parametrize("degrees", [{}, {"cp": 2}, {"cp": 2, "tp": 2}, {"tp": 4}], ids=str)
def test_routers_decide_as_if_all_tokens_were_on_one_rank(degrees: dict[str, Any]) -> None:
    by_rank = run_on_ranks(4, all_cases, degrees)
    for case, expected, views in zip(CASES, all_cases({}), zip(*by_rank, strict=True), strict=True):
        index_N = torch.cat([view["index"] for view in views])
        assert sorted(index_N.tolist()) == list(range(ROWS * LENGTH))
        expert_NK = torch.cat([view["expert"] for view in views])[index_N.argsort()]
        assert torch.equal(expert_NK, expected["expert"]), case
        for view in views:
            assert view["losses"] == pytest.approx(expected["losses"], rel=1e-12), case
            assert torch.equal(view["bias"], expected["bias"])
            assert 0 < view["most"] <= expected["most"]
        gradient = sum((view["gradient"] for view in views), torch.zeros(EXPERTS, DIM))
        assert_close(f"{case}", gradient, expected["gradient"])
