"""Every router of the package in float64, by name, for tests of what all of them promise."""

from collections.abc import Callable

import torch

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
    HierarchicalRouter,
    LearnedNoise,
    LocalEntropyLoss,
    NormalNoise,
    PerSequence,
    PerTask,
    RandomSecond,
    RoundRobinRouter,
    Router,
    SelectionBias,
    SinkhornRouter,
    ThorRouter,
    ThresholdSecond,
    TokenCap,
    TopKRouter,
    UniformRouter,
    random_table,
)

DIM, NUM_EXPERTS, NUM_IDS = 6, 4, 8

Make = Callable[[], Router]


def top_k(k: int = 2, **options: object) -> Make:
    """Token choice with weights far enough apart that content decides."""
    return lambda: TopKRouter(DIM, NUM_EXPERTS, k, init_std=1.0, seed=0, **options)


def tight(order: str, k: int, **options: object) -> Make:
    """Token choice under a capacity that drops."""
    capacity = Capacity(factor=0.75, eval_factor=0.75, order=order, **options)
    return top_k(k, capacity=capacity)


def noisy() -> Router:
    """Shazeer's noise, already trained."""
    router = top_k(noise=LearnedNoise(DIM, NUM_EXPERTS))()
    torch.nn.init.normal_(router.noise.weight_ED, generator=torch.Generator().manual_seed(0))
    return router


def hash_by(by: str, num_ids: int = NUM_IDS) -> Make:
    """A hash router with a random table."""
    return lambda: HashRouter(DIM, NUM_EXPERTS, random_table(num_ids, NUM_EXPERTS), by=by)


EVERY_ROUTER: dict[str, Make] = {
    "top-1": top_k(1),
    "top-2": top_k(),
    "all": top_k(NUM_EXPERTS),
    "sigmoid": top_k(score="sigmoid", renormalize="chosen", bias=SelectionBias(NUM_EXPERTS)),
    "noise": top_k(noise=NormalNoise(0.5)),
    "learned noise": noisy,
    "second sampled": top_k(renormalize="chosen", sampling="second"),
    "all sampled": top_k(sampling="all"),
    "entropies": top_k(losses=(LocalEntropyLoss(coef=0.1), GlobalEntropyLoss(coef=0.1))),
    "groups": top_k(1, group_limit=GroupLimit(num_groups=2, kept=1)),
    "random second": top_k(renormalize="chosen", skip=RandomSecond(0.5)),
    "threshold second": top_k(skip=ThresholdSecond(0.5)),
    "position, k=1": tight("position", 1),
    "position, k=2": tight("position", 2),
    "position by sequence, k=1": tight("position", 1, scope="sequence"),
    "token, k=2": tight("token", 2),
    "priority, k=1": tight("priority", 1),
    "probability, k=2": tight("probability", 2),
    "random order, k=1": tight("random", 1),
    "cosine": lambda: CosineRouter(DIM, NUM_EXPERTS, 2, proj_dim=5, noise_std=0.5, seed=0),
    "two levels": lambda: HierarchicalRouter(DIM, NUM_EXPERTS, num_groups=2, init_std=1.0, seed=0),
    "expert choice": lambda: ExpertChoiceRouter(DIM, NUM_EXPERTS, 1.0, init_std=1.0, seed=0),
    "expert choice by sequence": lambda: ExpertChoiceRouter(
        DIM, NUM_EXPERTS, 2.0, init_std=1.0, seed=0, scope="sequence"
    ),
    "capped expert choice": lambda: ExpertChoiceRouter(
        DIM, NUM_EXPERTS, 1.0, init_std=1.0, seed=0, cap=TokenCap(most=2)
    ),
    "batchwise": lambda: BatchwiseRouter(DIM, NUM_EXPERTS, 1, init_std=1.0, seed=0),
    "base": lambda: BaseRouter(DIM, NUM_EXPERTS, gain=1.0, seed=0),
    "sinkhorn": lambda: SinkhornRouter(DIM, NUM_EXPERTS, 2, init_std=1.0, seed=0),
    "hash of the token": hash_by("token"),
    "hash of the previous": hash_by("previous"),
    "hash of the position": hash_by("position", 64),
    "thor": lambda: ThorRouter(DIM, NUM_EXPERTS),
    "uniform": lambda: UniformRouter(DIM, NUM_EXPERTS, 2),
    "round robin": lambda: RoundRobinRouter(DIM, NUM_EXPERTS, 2),
    "fixed": lambda: FixedRouter(DIM, NUM_EXPERTS, (2, 0)),
    "per sequence": lambda: PerSequence(top_k()()),
    "per task": lambda: PerTask(top_k()(), NUM_IDS, seed=0),
}


def router_named(name: str) -> Router:
    """A router by its name in ``EVERY_ROUTER``, in float64 and training."""
    return EVERY_ROUTER[name]().double()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids (or task ids) that every router knows."""
    return torch.randint(NUM_IDS, shape, generator=torch.Generator().manual_seed(seed))
