"""A model that a user might write, and training passes of it on a mesh."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.dispatch.collectives import split_sizes
from expertmesh.experts import Experts, GatedMLPExperts, MLPExperts, ModuleExperts
from expertmesh.layer import MoE, set_loss_scale
from expertmesh.parallel.fsdp import gradient_sync
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey, normal
from expertmesh.routing import LoadBalancingLoss, TopKRouter, ZLoss
from expertmesh.shards import Shard
from expertmesh.testing.equivalence import pieces

DIM, HIDDEN, EXPERTS = 8, 4, 4


class Expert(nn.Module):
    """A user's own expert: both projections have one weight, a scale has two names."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, HIDDEN, dtype=torch.float64)
        self.scale = nn.Parameter(torch.rand(DIM, dtype=torch.float64))
        self.same = self.scale
        self.register_buffer("shift", torch.rand(DIM, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x)) @ self.up.weight
        return hidden * self.same + self.shift * self.scale


def experts_of(kind: str) -> Experts:
    """Experts of a kind, whose biases are not zero."""
    if kind == "module":
        return ModuleExperts(Expert, EXPERTS, dim=DIM, seed=1)
    family = {"mlp": MLPExperts, "gated": GatedMLPExperts}[kind]
    experts = family(DIM, HIDDEN, EXPERTS, bias=True, init_std=0.5, seed=1)
    with torch.no_grad():
        for name, param in experts.named_parameters():
            if name.endswith("bias"):
                param.copy_(torch.linspace(-1, 1, param.numel()).view_as(param))
    return experts.double()


def moe_of(kind: str = "gated", seed: int = 1, **router: Any) -> MoE:
    """A layer in float64."""
    decides = TopKRouter(DIM, EXPERTS, 2, init_std=1.0, seed=seed, **router).double()
    return MoE(decides, experts_of(kind))


class Block(nn.Module):
    """Norm, a dense layer, and experts of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, dtype=torch.float64)
        self.dense = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.moe = moe_of(kind, losses=(LoadBalancingLoss(coef=0.1), ZLoss(coef=0.01)))

    def forward(self, x_TD: Tensor, key: RandomKey) -> Tensor:
        return x_TD + self.moe(torch.tanh(self.dense(self.norm(x_TD))), key=key)


class UserModel(nn.Module):
    """Blocks in a list, one MoE layer that is used after each of them, and frozen parameters."""

    def __init__(self, kinds: tuple[str, ...] = ("gated", "module")) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(DIM, DIM, dtype=torch.float64)
            self.blocks = nn.ModuleList(Block(kind) for kind in kinds)
            self.moe = moe_of("mlp", seed=5)
            self.last = nn.Linear(DIM, DIM, bias=False, dtype=torch.float64)
        self.first.bias.requires_grad_(False)
        for param in self.blocks.get_submodule("0.moe.experts").parameters():
            param.requires_grad_(False)

    def forward(self, x_TD: Tensor, key: RandomKey) -> Tensor:
        x_TD = self.first(x_TD)
        for block in self.blocks:
            x_TD = block(x_TD, key)
            x_TD = x_TD + self.moe(x_TD, key=key)
        return self.last(x_TD)


@dataclass(frozen=True)
class Passed:
    """What a rank got from the micro-batches of one step.

    Attributes:
        outputs: Of its own tokens, by micro-batch.
        gradients: Its pieces; none of a parameter without gradient.
        loss: Summed over all its tokens.
    """

    outputs: list[Tensor]
    gradients: dict[str, Shard]
    loss: Tensor


def tokens(number: int, start: int) -> Tensor:
    """``(number, D)`` in float64."""
    index = torch.arange(start * DIM, (start + number) * DIM)
    return normal(3, index, torch.float64).view(number, DIM)


def own_tokens(mesh: Mesh, number: int) -> slice:
    sizes = split_sizes(number, mesh.stage.size)
    start = sum(sizes[: mesh.stage.index])
    return slice(start, start + sizes[mesh.stage.index])


def passes(model: nn.Module, mesh: Mesh, sizes: tuple[int, ...] = (13, 6)) -> Passed:
    """Forward and backward of micro-batches of so many tokens each, on the whole mesh."""
    outputs, losses, whole = [], [], sum(sizes)
    for place, number in enumerate(sizes):
        start = sum(sizes[:place])
        own = own_tokens(mesh, number)
        gradient_sync(model, last=place == len(sizes) - 1)
        set_loss_scale(model, number / whole)
        x_TD = tokens(number, start)[own]
        key = RandomKey.of(0, 1, torch.arange(start, start + number)[own])
        y_TD = model(x_TD, key)
        loss = (y_TD * torch.sin(3 * x_TD)).sum() / whole
        loss.backward()
        outputs.append(y_TD.detach())
        losses.append(loss.detach())
    return Passed(outputs, gradient_pieces(model), torch.stack(losses).sum())


def gradient_pieces(model: nn.Module) -> dict[str, Shard]:
    """This rank's pieces of the gradients."""
    return pieces((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
