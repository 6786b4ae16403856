"""A DDP script with its experts dealt out over the ranks.

    torchrun --nproc-per-node 2 examples/ddp.py

Without ``em.Mesh`` and ``em.ddp`` it is an ordinary DDP script in which every rank holds all
experts. With them the losses are the same, and each rank holds its share.
"""

import os

import torch
import torch.distributed as dist
from torch import nn

import expertmesh as em


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32),
        em.MoE(
            em.TopKRouter(32, 8, 2, losses=[em.LoadBalancingLoss(coef=0.01)]),
            em.GatedMLPExperts(32, 64, num_experts=8),
        ),
        nn.Linear(32, 1),
    )
    mesh = em.Mesh(ep=int(os.environ.get("EP", dist.get_world_size())))
    model = em.ddp(model, mesh)
    optimizer = torch.optim.AdamW(em.param_groups(model), lr=1e-2)

    batches = torch.randn(20, 64, 16, generator=torch.Generator().manual_seed(1))
    for x in batches.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]:
        loss = (model(x) - x.sum(dim=-1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        em.clip_grad_norm_(model, 1.0, mesh)
        optimizer.step()

    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(mesh.grid.describe())
        print(f"last loss {loss.item() / dist.get_world_size():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
