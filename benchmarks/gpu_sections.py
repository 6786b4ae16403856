"""Sections of docs/benchmarks.md on one GPU; see ``page.py``."""

import math
from typing import Any

_TERAFLOPS = 1e9  # of FLOPs by milliseconds


def beside_peers(result: dict[str, Any], made_by: str) -> str:
    """The layer beside other libraries'."""
    contenders = list(next(iter(result["median_ms"].values()))["forward"])
    choice = "tuned by themselves" if result["tuned"] else "with one fixed tile each"
    lines = [
        "## The layer beside other libraries' on one GPU\n",
        made_by,
        "Milliseconds forward without gradient / forward and backward, medians, bfloat16; MiB held "
        f"between the two. SonicMoE and Liger-Kernel {choice}. Last column: what of "
        f"{result['matmul_tflops']:.0f} TFLOP/s, a large product in this run, is in forward and "
        "backward.\n",
        f"| shape (T, D, F, E, K) | {' | '.join(contenders)} | of a large product |",
        f"|---|{'---:|' * (len(contenders) + 1)}",
    ]
    for name, times in result["median_ms"].items():
        shape = result["shapes"][name]
        cells = [f"{name} ({', '.join(str(shape[letter]) for letter in 'TDFEK')})"]
        for who in contenders:
            if who not in times["forward"]:
                cells.append(result["missing"][name].get(who, "").split(":")[0])
                continue
            cell = " / ".join(f"{row[who]:.2f}" for row in times.values())
            saved = result["saved_mib"][name].get(who)
            cells.append(cell if saved is None else f"{cell}, {saved:.0f}")
        flops = 18 * shape["T"] * shape["K"] * shape["D"] * shape["F"]
        speed = flops / times["forward and backward"]["expertmesh"] / _TERAFLOPS
        cells.append(f"{speed / result['matmul_tflops']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    for who in contenders[1:]:
        ratios = [
            row[who] / row["expertmesh"]
            for times in result["median_ms"].values()
            if who in (row := times["forward and backward"])
        ]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines += [
            "",
            f"{who}, forward and backward: {mean:.2f} times ours in the geometric mean of "
            f"{len(ratios)} shapes, from {min(ratios):.2f} to {max(ratios):.2f}.",
        ]
    if note := result.get("note"):
        lines += ["", note]
    return "\n".join([*lines, ""])


def loads(result: dict[str, Any], made_by: str) -> str:
    """Skew, number of tokens, first call."""
    skew, tokens = result["skew_ms"], result["tokens"]
    kinds = list(next(iter(skew.values())))
    columns = list(next(iter(tokens.values())))
    first = ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["first_step_s"].items())
    lines = [
        "## Experts under load on one GPU\n",
        made_by,
        "Forward and backward of the expert operation. The same rows, spread otherwise, "
        "milliseconds and times uniform:\n",
        f"| shape | {' | '.join(kinds)} |",
        f"|---|{'---:|' * len(kinds)}",
    ]
    for name, times in skew.items():
        uniform = times["uniform"]
        cells = [f"{times[kind]:.2f} ({times[kind] / uniform:.2f})" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "\nOLMoE's experts by number of tokens, beside GShard's dispatch by one-hot einsums with "
        "room for an equal share:\n",
        f"| tokens | {' | '.join(columns)} |",
        f"|---:|{'---:|' * len(columns)}",
    ]
    for num_tokens, row in tokens.items():
        cells = [f"{row[column]:.1f}" if column in row else "" for column in columns]
        lines.append(f"| {num_tokens} | {' | '.join(cells)} |")
    lines.append(f"\nSeconds from an empty kernel cache to the end of the first step: {first}.")
    return "\n".join([*lines, ""])


def decode(result: dict[str, Any], made_by: str) -> str:
    """Decoding steps beside transformers'."""
    rows = [
        (name, tokens, row)
        for name, steps in result["steps"].items()
        for tokens, row in steps.items()
    ]
    contenders = list(dict.fromkeys(who for _, _, row in rows for who in row["us"]))
    lines = [
        "## Decoding steps on one GPU\n",
        made_by,
        "Microseconds in CUDA graphs, and the time to read the chosen experts' weights as a share "
        "of them.\n",
        f"| shape | tokens | bound | {' | '.join(contenders)} |",
        f"|---|---:|---:|{'---:|' * len(contenders)}",
    ]
    for name, tokens, row in rows:
        cells = [
            f"{row['us'][who]:.0f} ({row['share_of_bound'][who]:.2f})" if who in row["us"] else ""
            for who in contenders
        ]
        lines.append(f"| {name} | {tokens} | {row['bound_us']:.0f} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
