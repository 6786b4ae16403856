"""Two jobs in one world: meshes of different ranks that know nothing of each other."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from expertmesh.dispatch.collectives import all_reduce
from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.clip import clip_grad_norm_
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.handshake import same_on_all_ranks
from expertmesh.parallel.mesh import Mesh
from expertmesh.testing import run_on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 11,
    "dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 4,
}


def one_of_two_jobs(differing: bool) -> tuple[str, list[float]]:
    """On ranks 0 and 1 one job, on 2 and 3 another; what a rank was told, and its losses."""
    timeout = 40.0
    started = time.monotonic()
    meshes = [Mesh(ranks=[0, 1], ep=2, timeout=timeout), Mesh(ranks=[2, 3], ep=2, timeout=timeout)]
    mesh = meshes[0] if meshes[0].member else meshes[1]
    told, losses = "", []
    rate = 0.1 if differing and dist.get_rank() == 0 else 0.2
    try:
        same_on_all_ranks({"optim.lr": rate}, Agreement(mesh.everyone))
        losses = trained(mesh, rate)
    except UserError as error:
        told = str(error)
    assert time.monotonic() - started < timeout, "somebody waited for the timeout"
    return told, losses


def trained(mesh: Mesh, rate: float) -> list[float]:
    model = parallelize(DecoderLM(DecoderConfig(**SHAPE), seed=1), mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    tokens_BS = torch.arange(10).view(2, 5)[mesh.everyone.index :: 2]
    losses = []
    for _ in range(3):
        logits_BSV = model(tokens_BS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BSV.mT, tokens_BS[:, 1:]) / 2
        loss.backward()
        clip_grad_norm_(model, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(all_reduce(loss.detach(), mesh.everyone)))
    return losses


def test_both_train_as_each_would_alone() -> None:
    views = run_on_ranks(4, one_of_two_jobs, False)
    assert [told for told, _ in views] == [""] * 4
    first = views[0][1]
    assert len(set(first)) == 3
    assert all(losses == first for _, losses in views)


def test_a_mistake_in_one_is_told_to_its_ranks_and_the_other_goes_on() -> None:
    zero, one, two, three = run_on_ranks(4, one_of_two_jobs, True)
    assert zero == one
    assert "optim.lr: rank 0 says 0.1; rank 1 says 0.2" in zero[0]
    assert two == three
    assert two[0] == ""
    assert len(two[1]) == 3


def waits(folder: Path) -> float:
    """How long rank 2 waits over the expert group for rank 3, which does not come."""
    mesh = Mesh(ep=2, timeout=2)
    given_up = folder / "given up"
    began = time.monotonic()
    if mesh.rank == 2:
        with pytest.raises(RuntimeError):
            all_reduce(torch.ones(1), mesh.group("ep"))
        given_up.touch()
    while mesh.rank == 3 and not given_up.exists():
        time.sleep(0.02)
    return time.monotonic() - began


def test_every_group_of_a_mesh_has_its_timeout(tmp_path: Path) -> None:
    """Without it rank 2 would wait longer than this call, and that be an error."""
    assert run_on_ranks(4, waits, tmp_path)[2] > 1
