"""A rank of a job that says what it sent: ``traffic_job.py STEPS PLACEMENT...``.

The mesh and the ZeRO stages are those of the strategy ``ep_zero``, whose placement is "outside".

The model is one MoE layer whose experts outweigh everything else. Each rank prints a JSON line for
each placement: bytes of the all-to-all by expertmesh's own count, the link's counter over the same
steps, and the bytes of the experts' parameters.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import expertmesh as em
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.strategies import strategy

COUNTER = Path("/sys/class/net/fast0/statistics/tx_bytes")
D, F, E, K, T = 64, 1024, 4, 2, 256


def step(moe: em.MoE, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
    x = torch.randn(T, D, generator=generator)
    (moe(x) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def main(steps: int, *placements: str) -> None:
    dist.init_process_group("gloo")
    for placement in placements:
        print(json.dumps(counted(steps, placement)), flush=True)
        dist.barrier()
    dist.destroy_process_group()


def counted(steps: int, placement: str) -> dict[str, object]:
    chosen = strategy("ep_zero", dist.get_world_size(), E)
    mesh = Mesh(ep=chosen.ep, placement=placement)
    torch.manual_seed(0)
    moe = em.MoE(em.TopKRouter(D, E, k=K), em.GatedMLPExperts(D, F, E))
    parallelize(moe, mesh, zero=chosen.zero, expert_zero=chosen.expert_zero)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    step(moe, optimizer, 0)

    group = mesh.group(("ep", "etp"))
    group.traffic.bytes_sent.clear()
    dist.barrier()
    before = int(COUNTER.read_text())
    dist.barrier()
    for number in range(1, steps + 1):
        step(moe, optimizer, number)
    dist.barrier()
    return {
        "placement": placement,
        "rank": mesh.rank,
        "ep": mesh.grid.group_of(mesh.rank, "ep"),
        "edp": mesh.grid.group_of(mesh.rank, "edp"),
        "all_to_all": sum(group.traffic.bytes_sent.values()),
        "link": int(COUNTER.read_text()) - before,
        "experts": 4 * E * 3 * F * D,
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
