"""Meshes over the ranks of real process groups."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from expertmesh.dispatch.collectives import all_gather
from expertmesh.errors import UserError
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks
from tests.distributed.layers import alone, assert_same, layer, pass_through

AXES = ["pp", "dp", "cp", "tp", "edp", "ep", "etp"]
JOINED = [("dp", "cp"), ("cp", "tp"), ("dp", "cp", "tp"), ("ep", "etp"), ("pp", "dp", "cp", "tp")]


def heard(degrees: dict[str, Any]) -> tuple[dict[Any, list[int]], dict[Any, list[int]], str]:
    """Who answers in every group, and who should."""
    mesh = Mesh(**degrees)
    answers, expected = {}, {}
    for axes in [*AXES, *JOINED]:
        group = mesh.group(axes)
        answers[axes] = all_gather(torch.tensor([mesh.rank]), group).tolist()
        expected[axes] = list(group.ranks)
        assert group.ranks[group.index] == mesh.rank
        assert expected[axes] == mesh.grid.group_of(mesh.rank, axes)
        assert (group.process_group is None) == (group.size == 1)
        assert mesh.group(axes) is group
    assert mesh.stage is mesh.group(("dp", "cp", "tp"))
    assert mesh.everyone.size == mesh.world
    assert mesh.coordinates == mesh.grid.coordinates(mesh.rank)
    return answers, expected, repr(mesh)


@pytest.mark.parametrize(
    ("world", "degrees"),
    [
        (4, {"ep": 2}),
        (4, {"cp": 2, "tp": 2, "edp": 2, "etp": 2, "placement": "outside"}),
        (8, {"pp": 2, "tp": 2, "ep": 2, "placement": "outside"}),
    ],
    ids=str,
)
def test_a_group_reaches_the_ranks_that_it_names(world: int, degrees: dict[str, Any]) -> None:
    for answers, expected, _ in run_on_ranks(world, heard, degrees):
        assert answers == expected
    assert run_on_ranks(4, heard, {"ep": 2})[0][2] == (
        "Mesh(pp=1, dp=4, cp=1, tp=1, edp=2, ep=2, etp=1, placement='inside')"
    )


def test_without_processes_there_is_a_mesh_of_one() -> None:
    mesh = Mesh()
    assert (mesh.world, mesh.rank, mesh.member) == (1, 0, True)
    assert [mesh.group(axes).size for axes in [*AXES, *JOINED]] == [1] * 12
    assert mesh.group("ep").process_group is None
    with pytest.raises(UserError, match=r"ep=2 .* 1 ranks"):
        Mesh(ep=2)


def subsets() -> list[Any]:
    """Meshes of some ranks, made by all, used in an order that differs between ranks."""
    first, second = Mesh(ranks=[0, 1], ep=2), Mesh(ranks=[2, 3], edp=2)
    own, other = (first, second) if first.member else (second, first)
    assert not other.member
    refused = []
    for attempt in (lambda: other.group("ep"), lambda: parallelize(layer(), other)):
        with pytest.raises(UserError) as caught:
            attempt()
        refused.append(str(caught.value))
    views = [pass_through(parallelize(layer(), own), own, 8)]
    across, single = Mesh(ranks=[0, 2], ep=2), Mesh(ranks=[3])
    for mesh in (across, single):
        if mesh.member:
            views.append(pass_through(parallelize(layer(), mesh), mesh, 8))
    everyone = Mesh(ep=4)
    views.append(pass_through(parallelize(layer(), everyone), everyone, 8))
    return [refused, views]


def test_meshes_of_some_ranks_live_beside_each_other() -> None:
    (refused, zero), (_, one), (_, two), (_, three) = run_on_ranks(4, subsets, timeout=30)
    assert "rank 0 is not in Mesh(" in refused[0]
    assert "rank 0 is not in Mesh(" in refused[1]
    expected = alone(8)
    assert_same([zero[0], one[0]], expected)
    assert_same([two[0], three[0]], expected)
    assert_same([zero[1], two[1]], expected)
    assert_same([three[1]], expected)
    assert_same([zero[2], one[1], two[2], three[2]], expected)


def from_device_mesh() -> tuple[list[list[int]], str, str]:
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("hosts", "ranks"))
    mesh = Mesh(device_mesh=root, ep=2)
    assert mesh.device_type == "cpu"
    with pytest.raises(UserError) as slice_refused:
        Mesh(device_mesh=root["ranks"])
    with pytest.raises(UserError) as both:
        Mesh(device_mesh=root, ranks=[0, 1])
    return mesh.grid.groups("ep"), str(slice_refused.value), str(both.value)


def test_ranks_of_a_device_mesh() -> None:
    for rank, (groups, of_slice, both) in enumerate(run_on_ranks(4, from_device_mesh)):
        assert groups == [[0, 1], [2, 3]]
        assert f"ranks {[0, 1] if rank < 2 else [2, 3]}" in of_slice
        assert "give ranks=" in of_slice
        assert "ranks or device_mesh, not both" in both


def refusals() -> list[str]:
    messages = []
    attempts: list[dict[str, Any]] = [{"ranks": [1, 0]}, {"ranks": [0, 2]}, {"ep": 3}]
    for degrees in attempts:
        with pytest.raises(UserError) as caught:
            Mesh(**degrees)
        messages.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        Mesh().group(("pp", "dp"))
    assert dist.get_world_size() == 2
    return [*messages, str(caught.value)]


def test_what_cannot_be_made_is_refused_on_every_rank() -> None:
    for order, beyond, ep, axes in run_on_ranks(2, refusals):
        assert "ascending order" in order
        assert "got [1, 0]" in order
        assert "below the 2 of the world, got [0, 2]" in beyond
        assert "ep=3" in ep
        assert "(dp, cp), (cp, tp)" in axes
        assert "got (pp, dp)" in axes
