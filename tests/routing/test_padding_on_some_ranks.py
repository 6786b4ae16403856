"""A rank without padding is given no mask, and asks the others for what they ask it for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.dispatch.collectives import own_range
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.population import RankPopulation
from expertmesh.random import RandomKey, normal
from expertmesh.routing import BaseRouter, HashRouter, Router, SinkhornRouter
from expertmesh.testing import run_on_ranks

DIM, EXPERTS, LENGTH = 6, 4, 8
PADDING_BS = torch.zeros(2, LENGTH, dtype=torch.bool)
PADDING_BS[1, 5], PADDING_BS[1, 7] = True, True
# Rows are the ranks' over dp; over cp the second halves of both sequences are one rank's.
CASES: dict[str, tuple[Callable[[], Router], dict[str, Any]]] = {
    "sinkhorn": (lambda: SinkhornRouter(DIM, EXPERTS, 2, init_std=1.0, seed=0), {"dp": 2}),
    "base": (lambda: BaseRouter(DIM, EXPERTS, gain=1.0, seed=0), {"dp": 2}),
    "hash": (
        lambda: HashRouter(DIM, EXPERTS, torch.arange(2 * LENGTH) % EXPERTS, by="previous"),
        {"cp": 2},
    ),
}


def chosen(name: str, mesh: Mesh | None = None) -> tuple[Tensor, Tensor]:
    """Indices of this rank's tokens, and the experts that they got."""
    router = CASES[name][0]().double()
    index_BS = torch.arange(2 * LENGTH).view(2, LENGTH)
    if mesh is not None:
        router.population = RankPopulation(mesh.stage, mesh.group(("cp", "tp")))
        for dim, axis in enumerate(("dp", "cp")):
            start, stop = own_range(index_BS.shape[dim], mesh.group(axis))
            index_BS = index_BS.narrow(dim, start, stop - start)
    index_T = index_BS.flatten()
    padding_T = PADDING_BS.flatten()[index_T]
    routing = router(
        normal(3, index_T[:, None] * DIM + torch.arange(DIM), torch.float64),
        token_ids=index_T,
        padding_mask=padding_T if mesh is None or bool(padding_T.any()) else None,
        sequence_length=index_BS.shape[1],
        key=RandomKey.of(0, 1, index_BS),
    )
    return index_T, routing.expert_TK


def on_ranks() -> dict[str, tuple[Tensor, Tensor]]:
    return {name: chosen(name, Mesh(**degrees)) for name, (_, degrees) in CASES.items()}


@pytest.fixture(scope="module")
def views() -> list[dict[str, tuple[Tensor, Tensor]]]:
    return run_on_ranks(2, on_ranks, timeout=30)


@pytest.mark.parametrize("name", CASES)
def test_padding_on_one_rank_counts_on_all(
    name: str, views: list[dict[str, tuple[Tensor, Tensor]]]
) -> None:
    index_N = torch.cat([view[name][0] for view in views])
    expert_NK = torch.cat([view[name][1] for view in views])
    assert torch.equal(expert_NK[index_N.argsort()], chosen(name)[1])
