"""Sections of docs/benchmarks.md on one GPU; see ``page.py``."""

import math
from typing import Any

_TERAFLOPS = 1e9  # of FLOPs by milliseconds


def layer(result: dict[str, Any], made_by: str) -> str:
    """The layer against its matrix products and transformers."""
    contenders = _contenders(result)
    lines = [
        "## The layer on one GPU\n",
        made_by,
        "Milliseconds forward without gradient / forward and backward, medians, bfloat16; MiB "
        "allocated between the two where measured, the output included. A large matrix product "
        f"ran at {result['matmul_tflops']:.0f} TFLOP/s, a copy at {result['copy_tb_per_s']:.2f} "
        "TB/s.\n",
        f"| shape (T, D, F, E, K) | {' | '.join(contenders)} | speed over bmm |",
        f"|---|{'---:|' * (len(contenders) + 1)}",
    ]
    for name in result["median_ms"]:
        fractions = " / ".join(f"{x:.2f}" for x in result["bmm_speed_fraction"][name].values())
        cells = [_shape(result, name), *_times(result, name, contenders), fractions]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def beside_peers(result: dict[str, Any], made_by: str) -> str:
    """The layer beside other libraries'."""
    contenders = _contenders(result)
    choice = "tuned by themselves" if result["tuned"] else "with one fixed tile each"
    lines = [
        "## The layer beside other libraries' on one GPU\n",
        made_by,
        "Milliseconds forward without gradient / forward and backward, medians, bfloat16; MiB "
        f"allocated between the two, the output included. SonicMoE and Liger-Kernel {choice}. "
        f"Last column: what of a large product's {result['matmul_tflops']:.0f} TFLOP/s is in "
        "forward and backward.\n",
        f"| shape (T, D, F, E, K) | {' | '.join(contenders)} | of a large product |",
        f"|---|{'---:|' * (len(contenders) + 1)}",
    ]
    for name, times in result["median_ms"].items():
        shape = result["shapes"][name]
        flops = 18 * shape["T"] * shape["K"] * shape["D"] * shape["F"]
        speed = flops / times["forward and backward"]["expertmesh"] / _TERAFLOPS
        share = f"{speed / result['matmul_tflops']:.2f}"
        cells = [_shape(result, name), *_times(result, name, contenders), share]
        lines.append(f"| {' | '.join(cells)} |")
    for who in contenders:
        if who != "expertmesh":
            lines += ["", _against(who, result["median_ms"])]
    lines += ["", *_reasons(result["missing"])]
    if note := result.get("note"):
        lines += [note, ""]
    return "\n".join(lines)


def _contenders(result: dict[str, Any]) -> list[str]:
    """All of any shape: one may fail, or be missing, where another is measured."""
    rows = (row for times in result["median_ms"].values() for row in times.values())
    return list(dict.fromkeys(who for row in rows for who in row))


def _shape(result: dict[str, Any], name: str) -> str:
    sizes = ", ".join(str(result["shapes"][name][letter]) for letter in "TDFEK")
    return f"{name} ({sizes})"


def _times(result: dict[str, Any], name: str, contenders: list[str]) -> list[str]:
    cells = []
    for who in contenders:
        times, saved = result["median_ms"][name], result["saved_mib"][name].get(who)
        numbers = [row[who] for row in times.values() if who in row]
        cell = " / ".join(f"{ms:.2f}" for ms in numbers)
        cells.append(cell if saved is None or not numbers else f"{cell}, {saved:.0f}")
    return cells


def _against(who: str, median_ms: dict[str, Any]) -> str:
    ratios = [
        row[who] / row["expertmesh"]
        for times in median_ms.values()
        if who in (row := times["forward and backward"])
    ]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return (
        f"{who}, forward and backward: {mean:.2f} times ours in the geometric mean of "
        f"{len(ratios)} shapes, from {min(ratios):.2f} to {max(ratios):.2f}."
    )


def _reasons(missing: dict[str, dict[str, str]]) -> list[str]:
    """Who was not measured, and why."""
    rows = [
        f"- {who} at {name}: {reason}"
        for name, reasons in missing.items()
        for who, reason in reasons.items()
    ]
    return ["Not measured:\n", *rows, ""] if rows else []


def loads(result: dict[str, Any], made_by: str) -> str:
    """Skew, number of tokens, first call."""
    skew, tokens = result["skew_ms"], result["tokens"]
    kinds = list(dict.fromkeys(kind for row in skew.values() for kind in row))
    columns = list(dict.fromkeys(column for row in tokens.values() for column in row))
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
        "Microseconds, in CUDA graphs unless the column says otherwise, and the time to read the "
        "chosen experts' weights as a share of them.\n",
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


def step(result: dict[str, Any], made_by: str) -> str:
    """A whole training step."""
    lines = [
        "## A training step on one GPU\n",
        made_by,
        f"{result['model']} with {result['layers']} layers; {result['micro_batches']} x "
        f"{result['rows']} x {result['sequence']} tokens a step; forward, backward, clipping and "
        f"AdamW; {result['precision']}; medians. MFU = {result['mfu_is']}.\n",
        "| contender | tokens/s | step ms | MFU | peak GiB | parameters | active |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for who, row in result["contenders"].items():
        if "error" in row:
            lines.append(f"| {who} | {row['error']} | | | | | |")
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        lines.append(
            f"| {who} | {row['tokens_per_second']:,.0f} | {row['step_ms']:.1f} | {mfu} | {peak} | "
            f"{row['num_params']:,} | {row['num_active_params']:,} |"
        )
    if result["aims"]:
        lines += ["", "| aim | found | wanted | |", "|---|---:|---|---|"]
    lines += [
        f"| {aim['what']} | {aim['found']:,.2f} | {aim['wanted']} | "
        f"{'met' if aim['met'] else 'missed'} |"
        for aim in result["aims"]
    ]
    for who, row in result["contenders"].items():
        if parts := row.get("profile", {}).get("parts"):
            shares = sorted(parts.items(), key=lambda item: -item[1])
            words = ", ".join(f"{part} {share:.0%}" for part, share in shares)
            lines += ["", f"Where the device's time goes, {who}, by kernels' names: {words}."]
    return "\n".join([*lines, ""])
