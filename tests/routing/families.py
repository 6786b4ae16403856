"""One router of each family, in float64, and a layer around it on a mesh."""

from collections.abc import Callable

import torch
from torch import Tensor

from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.clip import clip_grad_norm_
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.routing import (
    BaseRouter,
    BatchwiseRouter,
    Capacity,
    CosineRouter,
    ExpertChoiceRouter,
    FixedRouter,
    GlobalEntropyLoss,
    GroupLimit,
    HashRouter,
    HierarchicalLoadLoss,
    HierarchicalRouter,
    ImportanceLoss,
    LearnedNoise,
    LoadBalancingLoss,
    LoadLoss,
    LocalEntropyLoss,
    NormalNoise,
    PerSequence,
    PerTask,
    RoundRobinRouter,
    Router,
    SelectionBias,
    SinkhornRouter,
    ThorRouter,
    ThresholdLoss,
    TokenCap,
    TopKRouter,
    UniformRouter,
    ZLoss,
)
from expertmesh.testing.equivalence import pieces
from tests.distributed.layers import DIM, Seen, own_slice, tokens

E = 4
SEED = {"seed": 1, "init_std": 1.0, "dtype": torch.float64}
TABLE = torch.arange(20) * 7 % E


def hierarchical() -> Router:
    """With noise on both levels, one of them learned, and the paper's losses."""
    return HierarchicalRouter(
        DIM,
        E,
        num_groups=2,
        primary_noise=LearnedNoise(DIM, 2, dtype=torch.float64),
        secondary_noise=NormalNoise(0.3),
        losses=(ImportanceLoss(coef=0.1), HierarchicalLoadLoss(coef=0.1)),
        **SEED,
    )


def cosine() -> Router:
    """With noise, losses, and a capacity that drops."""
    return CosineRouter(
        DIM,
        E,
        2,
        proj_dim=5,
        noise_std=0.3,
        capacity=Capacity(factor=0.9),
        losses=(LoadBalancingLoss(coef=0.1), LoadLoss(coef=0.1)),
        **SEED,
    )


FAMILIES: dict[str, Callable[[], Router]] = {
    "expert_choice": lambda: ExpertChoiceRouter(DIM, E, 1.5, **SEED),
    "expert_choice_sequence": lambda: ExpertChoiceRouter(DIM, E, 2.0, scope="sequence", **SEED),
    "expert_choice_cap": lambda: ExpertChoiceRouter(DIM, E, 2.0, cap=TokenCap(most=2), **SEED),
    "batchwise": lambda: BatchwiseRouter(
        DIM, E, 1.5, losses=(ThresholdLoss(coef=0.3), ImportanceLoss(coef=0.1)), **SEED
    ),
    "base": lambda: BaseRouter(DIM, E, gain=1.0, seed=1, dtype=torch.float64),
    "hash": lambda: HashRouter(DIM, E, TABLE),
    "hash_previous": lambda: HashRouter(DIM, E, TABLE, by="previous"),
    "hash_position": lambda: HashRouter(DIM, E, TABLE, by="position"),
    "thor": lambda: ThorRouter(DIM, E),
    "thor_sequence": lambda: ThorRouter(DIM, E, evaluation="sequence"),
    "uniform": lambda: UniformRouter(DIM, E, 2),
    "round_robin": lambda: RoundRobinRouter(DIM, E, 3),
    "fixed": lambda: FixedRouter(DIM, E, (2, 0)),
    "sinkhorn": lambda: SinkhornRouter(DIM, E, 2, losses=(ZLoss(coef=0.1),), **SEED),
    "entropy": lambda: TopKRouter(
        DIM, E, 2, losses=(LocalEntropyLoss(coef=0.1), GlobalEntropyLoss(coef=0.1)), **SEED
    ),
    "sampled": lambda: TopKRouter(DIM, E, 2, sampling="second", renormalize="kept", **SEED),
    "biased_groups": lambda: TopKRouter(
        DIM,
        E,
        2,
        score="sigmoid",
        bias=SelectionBias(E),
        group_limit=GroupLimit(num_groups=2, kept=1),
        **SEED,
    ),
    "per_sequence": lambda: PerSequence(TopKRouter(DIM, E, 2, **SEED)),
    "per_task": lambda: PerTask(TopKRouter(DIM, E, 2, **SEED), 20, seed=1, dtype=torch.float64),
    "cosine": cosine,
    "hierarchical": hierarchical,
}


def token_ids(count: int) -> Tensor:
    """int64 ``(count,)`` below 20."""
    return torch.arange(count) * 13 % 20


def see(name: str, mesh: Mesh, training: bool) -> Seen:
    """One pass of 4 sequences of 3 tokens, one of them padding, through a layer on a mesh."""
    experts = GatedMLPExperts(DIM, 8, E, init_std=0.5, seed=1)
    moe = parallelize(MoE(FAMILIES[name](), experts).double().train(training), mesh)
    own = own_slice(mesh, 4)
    x_BSD = tokens(12).view(4, 3, DIM)[own].clone().requires_grad_()
    mask_BS = torch.zeros(4, 3, dtype=torch.bool)
    mask_BS[1, 2] = True
    y_BSD, routing = moe(
        x_BSD,
        token_ids=token_ids(12).view(4, 3)[own],
        padding_mask=mask_BS[own],
        key=RandomKey.of(3, 1, torch.arange(12).view(4, 3)[own]),
        return_routing=True,
    )
    (y_BSD * torch.sin(tokens(12).view(4, 3, DIM)[own])).sum().backward()
    norm = clip_grad_norm_(moe, 1e9, mesh)
    return Seen(
        y_TD=y_BSD.detach(),
        dx_TD=x_BSD.grad,
        gradients=pieces((n, p.grad) for n, p in moe.named_parameters() if p.grad is not None),
        norm=float(norm),
        load_E=routing.load_E,
        dropped=int(routing.num_dropped),
    )


def see_on_mesh(training: bool) -> dict[str, Seen]:
    """What a rank of two sees of every family."""
    return {name: see(name, Mesh(ep=2), training) for name in FAMILIES}
