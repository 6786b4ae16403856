"""``python -m expertmesh.routing``: every router in one Markdown table."""

import inspect
import re

import torch

from expertmesh.routing.capacity import Capacity
from expertmesh.routing.losses import BalanceLoss, LoadBalancingLoss
from expertmesh.routing.presets import ROUTER_PRESETS, router_preset
from expertmesh.routing.second_choice import RandomSecond, ThresholdSecond
from expertmesh.routing.topk import TopKRouter

AT_BALANCE = {
    "switch": "1",
    "megablocks": "1",
    "huggingface": "k",
    "gshard_paper": "1/E²",
    "deepseek_v3": "1",
}
"""Forms of the load-balancing loss to their value at perfect balance, coefficient left out."""

HEADER = (
    "router",
    "formula",
    "k",
    "capacity (training / evaluation)",
    "drop order",
    "losses (value at balance)",
    "causal",
    "source",
)

FAMILIES: tuple[tuple[str, ...], ...] = (
    (
        "`noisy_top_k`: `TopKRouter` with `LearnedNoise`",
        "softmax over the k highest of x W + N(0, softplus(x W_noise)²)",
        "any",
        "none",
        "",
        "importance (0), load (0)",
        "yes",
        "1701.06538",
    ),
    (
        "`entropy`: `TopKRouter` with `LocalEntropyLoss`, `GlobalEntropyLoss`",
        "top-k of p; weights over their sum",
        "any",
        "none",
        "",
        "mean of H(p), -H(mean p) (-log E)",
        "yes",
        "2206.02770",
    ),
    (
        "`hierarchical`: `HierarchicalRouter`",
        "softmax over the best groups times softmax over the best experts of each",
        "`k_groups` `k_each`",
        "none",
        "",
        "importance (0), two-level load (0)",
        "yes",
        "1701.06538, B",
    ),
    (
        "`cosine`: `CosineRouter`",
        "top-k of the softmax of cos(W x + b, M) exp(τ); weights over their sum",
        "any",
        "any",
        "any",
        "any",
        "as `TopKRouter`",
        "2206.03382",
    ),
    (
        "`hash`: `HashRouter`",
        "a table's entry for the token, the previous one or the position; weight 1",
        "1",
        "none",
        "",
        "none",
        "yes",
        "2106.04426",
    ),
    (
        "`batchwise`: `BatchwiseRouter`",
        "as expert choice in training, p above a learned threshold in evaluation; weights over "
        "their sum",
        "0 to E, `k` on average",
        "k n / E, always full / none",
        "by p",
        "threshold (0 where it chooses as the batch did)",
        "in evaluation",
        "1701.06538, F",
    ),
    (
        "`expert_choice`: `ExpertChoiceRouter`",
        "p over experts; each expert takes its best tokens, with weight p",
        "0 to E, `factor` on average",
        "`factor` n / E, always full",
        "by p",
        "none needed",
        "no",
        "2202.09368",
    ),
    (
        "`expert_choice` with `most`: `TokenCap`",
        "the same by an assignment that lets a token have at most `most` experts",
        "0 to `most`",
        "`factor` n / E",
        "by the assignment",
        "none needed",
        "no",
        "2202.09368, 3.3",
    ),
    (
        "`base`: `BaseRouter`",
        "balanced assignment that maximises Σ x w; sigmoid(x w) of the assigned",
        "1",
        "n / E / none",
        "",
        "none needed",
        "in evaluation",
        "2103.16716",
    ),
    (
        "`sinkhorn`: `SinkhornRouter`",
        "k highest of exp(x W) with equal row and column sums; raw scores",
        "any",
        "none",
        "",
        "none needed",
        "in evaluation",
        "2202.01169",
    ),
    (
        "`thor`: `ThorRouter`",
        "an expert at random, the same for a whole training batch; weight 1",
        "1",
        "none",
        "",
        "consistency of two passes",
        "yes",
        "2110.04260",
    ),
    (
        "`uniform`, `round_robin`, `fixed`: `UniformRouter`, `RoundRobinRouter`, `FixedRouter`",
        "at random, in turn, always the same; weight 1/k",
        "any",
        "none",
        "",
        "none",
        "yes",
        "for benchmarks",
    ),
    (
        "`PerSequence(router)`",
        "the router's, of the mean of a sequence",
        "the router's",
        "the router's, in sequences",
        "the router's",
        "the router's",
        "no",
        "2110.03742",
    ),
    (
        "`PerTask(router)`",
        "the router's, of a learned vector of the task",
        "the router's",
        "the router's",
        "the router's",
        "the router's",
        "as the router",
        "2110.03742",
    ),
    (
        "`SoftMoE` (a layer)",
        "slots are mixtures of all tokens, tokens are mixtures of all slots",
        "all",
        "none",
        "",
        "none needed",
        "no",
        "2308.00951",
    ),
)
"""Routers that are no preset of ``TopKRouter``, by their name in a run file where they have one."""


def router_table() -> str:
    """One row per preset and per other family; p is the softmax of x W."""
    rows = [_preset_row(name) for name in ROUTER_PRESETS]
    lines = [HEADER, tuple("---" for _ in HEADER), *rows, *FAMILIES]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def _preset_row(name: str) -> tuple[str, ...]:
    with torch.device("meta"):
        router = router_preset(name, dim=64, num_experts=64)
    capacity = router.capacity
    return (
        f"`{name}`",
        _formula(router),
        str(router.k),
        "none" if capacity is None else _capacity(capacity),
        "" if capacity is None else capacity.order,
        ", ".join(_loss(loss) for loss in router.losses) or "none",
        "yes" if router.leaks is None else "no",
        _source(name),
    )


def _formula(router: TopKRouter) -> str:
    score = "p" if router.score == "softmax" else "sigmoid(x W)"
    parts = [f"top-{router.k} of {score}"]
    if router.bias is not None:
        parts[0] += " + selection bias"
    if router.sampling != "no":
        drawn = {"second": "second drawn from p", "all": "all drawn from p"}[router.sampling]
        parts.append(drawn)
    if router.group_limit is not None:
        parts.append(f"in {router.group_limit.kept} of {router.group_limit.num_groups} groups")
    if isinstance(router.skip, RandomSecond):
        parts.append(f"second kept with chance min(1, g / {router.skip.threshold:g})")
    if isinstance(router.skip, ThresholdSecond):
        parts.append(f"second if at least {router.skip.ratio:g} of the first")
    if router.noise is not None:
        parts.append(type(router.noise).__name__)
    weights = {
        "no": "raw weights",
        "chosen": "weights over their sum",
        "kept": "weights over the sum of those kept",
    }[router.renormalize]
    parts.append(weights if router.scale == 1 else f"{weights}, times {router.scale:g}")
    return "; ".join(parts)


def _capacity(capacity: Capacity) -> str:
    evaluation = "none" if capacity.eval_factor is None else f"{capacity.eval_factor:g}"
    return f"{capacity.factor:g} / {evaluation}, `{capacity.formula}`"


def _loss(loss: BalanceLoss) -> str:
    if isinstance(loss, LoadBalancingLoss):
        scope = ", by sequence" if loss.scope == "sequence" else ""
        return f"balance {loss.coef:g} `{loss.form}` ({AT_BALANCE[loss.form]}{scope})"
    return f"{loss.name} {loss.coef:g}" + ("" if loss.name == "z" else " (0)")


def _source(name: str) -> str:
    found = re.search(r"arXiv ([\d.]+\d)", inspect.getdoc(ROUTER_PRESETS[name]) or "")
    return found.group(1) if found else "its code"


if __name__ == "__main__":
    print(router_table())
