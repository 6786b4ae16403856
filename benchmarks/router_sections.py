"""The sections of docs/benchmarks.md about routers."""

from typing import Any

READING = """\
The runs are short and the model is small: where two routers differ by less than seeds do, the
table does not rank them, and no paper's claim is tested here. Experts per token differ, and with
them the work: `switch`, `base`, `thor` and the hash routers take one, `two levels` four, the
others two. A router that is not causal is judged by generated, not by its validation loss; so few
steps give it little time to learn to use the leak, and a table, which has nothing to learn, can
lead. `uniform` and `thor` draw by a token's place in the batch, so their generated loss is that
of another draw and no leak. A capacity is shared with the batch's other sequences, so it moves
generated a little in causal routers too."""


def routers(result: dict[str, Any], made_by: str) -> str:
    """Each router trains the same model."""
    seeds = sorted({row["seed"] for row in result["runs"]})
    lines = [
        "## Each router trains the same model\n",
        made_by,
        f"The demo's decoder with {result['num_experts']} experts in each of its two MoE layers; "
        f"{result['steps']} steps of {result['tokens_per_step']} tokens, the same ones for every "
        f"router; means over seeds ({_listed(seeds)}). Validation loss in nats per token, and the "
        "difference between the highest and the lowest seed. Generated: what the loss of some "
        "held-out tokens rises by when each is routed with its past alone, as in generation. "
        "Imbalance (highest load over fair), dead experts of a layer and drops over the last "
        "quarter of training. Milliseconds of processor time, a step's median.\n",
        "| router | seeds | causal | val loss | spread | generated | imbalance | dead | dropped "
        "| ms |",
        f"|---|---:|---|{'---:|' * 7}",
    ]
    for name, row in sorted(result["means"].items(), key=lambda item: item[1]["val_loss"]):
        number = sum(run["router"] == name for run in result["runs"])
        lines.append(
            f"| {name} | {number} | {'yes' if row['leaks'] is None else 'no'} | "
            f"{row['val_loss']:.4f} | {row['val_loss_spread']:.4f} | "
            f"{row['generated_minus_at_once']:+.4f} | {row['imbalance']:.2f} | {row['dead']:.1f} | "
            f"{row['dropped']:.1%} | {row['step_ms']:.0f} |"
        )
    return "\n".join([*lines, "", _reading(result["means"]), ""])


def _reading(means: dict[str, dict[str, Any]]) -> str:
    losses = [row["val_loss"] for row in means.values()]
    spread = sum(row["val_loss_spread"] for row in means.values()) / len(means)
    gaps = [row["generated_minus_at_once"] for row in means.values() if row["leaks"] is not None]
    return (
        f"How to read it. From the lowest loss to the highest are {max(losses) - min(losses):.4f} "
        f"nats; the seeds of one router span {spread:.4f} on average. The largest gap of a router "
        f"that leaks is {max(gaps, key=abs):+.4f}. {READING}"
    )


def _listed(seeds: list[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def routing_cost(result: dict[str, Any], made_by: str) -> str:
    """What routing costs on a CPU."""
    shape = ", ".join(f"{letter} {result['shape'][letter]}" for letter in "TDFEK")
    times, fastest = result["median_ms"], result["min_ms"]
    lines = [
        "## What routing costs on a CPU\n",
        made_by,
        f"{shape}, float32, forward and backward in training. Top-k takes "
        f"{result['share_of_layer']:.1%} of the layer's {result['layer_ms']:.0f} ms; wanted: at "
        f"most {result['targets']['share_of_layer']:.0%}.\n",
        "| router | ms, median | fastest | times top-k |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {time:.1f} | {fastest[name]:.1f} | {time / times['top-k']:.2f} |"
        for name, time in times.items()
    ]
    lines.append(
        "\nThe auction alone runs on affinities of normal tokens and a normal matrix, `base` on "
        "those of its small initial centroids."
    )
    return "\n".join([*lines, "", _wanted(times, result["targets"]), ""])


def _wanted(times: dict[str, float], targets: dict[str, Any]) -> str:
    """What is wanted of each row but the first; the auction has a time of its own."""
    limits = {name: limit for name, limit in targets.items() if name in times}
    said = [f"at most {limit:.0f} ms of {name}" for name, limit in limits.items()]
    above = [
        f"{name} ({time / times['top-k']:.2f})"
        for name, time in times.items()
        if name not in limits and time > times["top-k"]
    ]
    missed = [name for name, limit in limits.items() if times[name] > limit] + above
    return (
        f"Wanted: {', '.join([*said, 'and of every other router ' + targets['others']])}. "
        f"Missed by {', '.join(missed) or 'none'}."
    )
