"""What routing costs on a CPU: against the layer's time, and routers against top-k.

    python benchmarks/routing_cost.py

One layer of 64 experts, 8 per token, width 512, hidden width 1024, 8192 tokens, float32, forward
and backward in training mode. ``share_of_layer`` is the router's time over the layer's. The other
routers are timed alone on the same tokens, in turns. Times are processor time of one thread, so
that a busy machine does not spoil them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import save  # beside this file
from torch import Tensor
from turns import take_turns

import expertmesh as em
from expertmesh.routing import Router, random_table
from expertmesh.routing.auction import balanced_assignment

SHAPE = {"T": 8192, "D": 512, "F": 1024, "E": 64, "K": 8}
VOCABULARY = 50_000
AUCTION = "BASE's auction alone"


def routers() -> dict[str, Router]:
    """The contenders, in training."""
    dim, num_experts, k = SHAPE["D"], SHAPE["E"], SHAPE["K"]
    return {
        "top-k": em.TopKRouter(dim, num_experts, k, seed=0),
        "top-k, balance loss": em.TopKRouter(
            dim, num_experts, k, seed=0, losses=(em.LoadBalancingLoss(coef=0.01),)
        ),
        "top-k, capacity 1.25": em.TopKRouter(
            dim, num_experts, k, seed=0, capacity=em.Capacity(factor=1.25)
        ),
        "expert choice": em.ExpertChoiceRouter(dim, num_experts, float(k), seed=0),
        "hash, random table": em.HashRouter(
            dim, num_experts, random_table(VOCABULARY, num_experts)
        ),
        "cosine": em.CosineRouter(dim, num_experts, k, seed=0),
        "two levels": em.HierarchicalRouter(
            dim, num_experts, num_groups=8, k_groups=2, k_each=4, seed=0
        ),
        "batchwise": em.BatchwiseRouter(dim, num_experts, k, seed=0),
        "sinkhorn": em.SinkhornRouter(dim, num_experts, k, seed=0),
        "base": em.BaseRouter(dim, num_experts, seed=0),
        "thor": em.ThorRouter(dim, num_experts),
        "uniform": em.UniformRouter(dim, num_experts, k),
    }


def steps(x_TD: Tensor, ids_T: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed."""

    def step(router: Router) -> Callable[[], object]:
        leaf_TD = x_TD.clone().requires_grad_()

        def run() -> object:
            routing = router(leaf_TD, token_ids=ids_T)
            total = routing.weight_TK.sum() + sum(routing.losses.values())
            return total.backward() if total.requires_grad else routing

        return run

    found: dict[str, Callable[[], object]] = {n: step(r) for n, r in routers().items()}
    affinity_TE = x_TD @ torch.randn(SHAPE["D"], SHAPE["E"])
    found[AUCTION] = lambda: balanced_assignment(affinity_TE)
    return found


def layer(x_TD: Tensor) -> Callable[[], object]:
    """The whole layer, forward and backward."""
    experts = em.GatedMLPExperts(SHAPE["D"], SHAPE["F"], SHAPE["E"], seed=0)
    moe = em.MoE(routers()["top-k"], experts)
    leaf_TD = x_TD.clone().requires_grad_()
    return lambda: moe(leaf_TD).backward(torch.ones_like(leaf_TD))


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the processor by contender."""
    return take_turns(runs, rounds, warm=1, clock=time.process_time)


def main() -> None:
    """Time everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of routers (default 5)")
    parser.add_argument("--layer-rounds", type=int, default=2, help="of the layer (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_TD = torch.randn(SHAPE["T"], SHAPE["D"])
    ids_T = torch.randint(VOCABULARY, (SHAPE["T"],))

    alone = measure(steps(x_TD, ids_T), arguments.rounds)
    together = measure(
        {"layer": layer(x_TD), "top-k": steps(x_TD, ids_T)["top-k"]}, arguments.layer_rounds
    )
    print(f"written to {save('routing_cost', results(alone, together, arguments.rounds))}")


def results(
    alone: dict[str, list[float]], together: dict[str, list[float]], rounds: int
) -> dict[str, Any]:
    """Medians, fastest rounds and the ratios that are wanted."""
    medians = {name: statistics.median(values) for name, values in alone.items()}
    share = statistics.median(together["top-k"]) / statistics.median(together["layer"])
    for name, median in medians.items():
        print(f"{name:24} {median:8.1f} ms, fastest {min(alone[name]):8.1f}")
    print(f"top-k over the layer: {share:.3f}")
    return {
        "shape": {**SHAPE, "dtype": "float32", "pass": "forward and backward, training"},
        "rounds": rounds,
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "min_ms": {name: round(min(values), 2) for name, values in alone.items()},
        "layer_ms": round(statistics.median(together["layer"]), 1),
        "share_of_layer": round(share, 4),
        "targets": {"share_of_layer": 0.05, AUCTION: 1000.0, "others": "below top-k"},
    }


if __name__ == "__main__":
    main()
