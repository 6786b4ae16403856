"""A model of one's own over all ranks: experts, pieces of everything else, in one call.

    torchrun --nproc-per-node 4 examples/fsdp.py

The loss is divided by the step's number of tokens on all ranks, and gradients are plain sums, so
any number of ranks gives the losses of one process.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

import expertmesh as em


class Block(nn.Module):
    """An MoE layer on a residual branch."""

    def __init__(self, dim: int, layer: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.moe = em.MoE(
            em.TopKRouter(dim, 8, 2, layer=layer, seed=layer),
            em.GatedMLPExperts(dim, 2 * dim, num_experts=8, seed=layer),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Some blocks and a head."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, layer) for layer in range(2))
        self.head = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    mesh = em.Mesh(ep=2 if world % 2 == 0 else 1)
    model = em.parallelize(Model(), mesh, zero=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    batches = torch.randn(20, 64, 32, generator=torch.Generator().manual_seed(1))
    for batch in batches:
        x = batch.chunk(world)[rank]
        loss = (model(x) - x.sum(dim=-1, keepdim=True)).square().sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        em.clip_grad_norm_(model, 1.0, mesh)
        optimizer.step()

    dist.all_reduce(loss)
    if rank == 0:
        print(mesh.grid.describe())
        print(f"last loss {loss.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
