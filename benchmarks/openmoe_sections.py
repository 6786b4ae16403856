"""The sections of docs/benchmarks.md on OpenMoE; see ``page.py``."""

from typing import Any

import openmoe_meshes  # beside this file


def one_gpu(result: dict[str, Any], made_by: str) -> str:
    """Training and generation from random weights."""
    published = result["published"]
    lines = [
        "## OpenMoE on one GPU\n",
        made_by,
        f"Training on sequences of {result['seq_len']} random tokens, bfloat16 weights and "
        "gradients, Adafactor, nothing dropped; medians. MFU = "
        f"{result['mfu_is']}. Published: {published['samples_per_second']} samples/s of an A800 "
        "beside seven others.\n",
        "| setting | samples/s | tokens/s | MFU | peak GB | loss, first to last | experts |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, row in result["training"].items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | | |")
            continue
        lines.append(
            f"| {name} | {row['samples_per_second']:.2f} | {row['tokens_per_second']:,.0f} | "
            f"{_number(row['mfu'], '.1%')} | {_number(row['memory_gb'], '.1f')} | "
            f"{row['first_loss']:.2f} to {row['last_loss']:.2f} | {row['experts_backend']} |"
        )
    lines += [
        "\nGeneration of one row, 32 tokens read and 32 written; beside it what users of the "
        "original are told to have.\n",
        "| model | weights GB | peak GB | published GB | ms a token |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in result["inference"].items():
        told = published["memory_gb"].get(name, "")
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | {told} | |")
            continue
        lines.append(
            f"| {name} | {_number(row['weights_gb'], '.1f')} | {_number(row['memory_gb'], '.1f')} "
            f"| {told} | {row['ms_per_token']:.1f} |"
        )
    return "\n".join([*lines, ""])


def loading(result: dict[str, Any], made_by: str) -> str:
    """Memory of published folders."""
    lines = [
        "## Loading OpenMoE\n",
        made_by,
        f"Folders in the published layout, all zeros; memory of loading one and of writing "
        f"{result['new_tokens']} tokens. GPU: what torch allocated at most. Host: what was the "
        "process's own at most, without the pages of mapped files. Published: what users of the "
        "original are told that a device needs.\n",
        "| setting | on | GPU GB, loaded | GPU GB, most | host GB | published GB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, row in result["settings"].items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | | |")
            continue
        told = result["published_gb"].get(f"{row['size']} {row['dtype']}", "")
        on = ", ".join(row["devices"]) or "one device"
        numbers = (_number(row[key], ".1f") for key in ("gpu_gb_load", "gpu_gb", "host_gb"))
        lines.append(f"| {name} | {on} | {' | '.join(numbers)} | {told} |")
    return "\n".join([*lines, ""])


def meshes(result: dict[str, Any], made_by: str) -> str:
    """Memory and traffic by arithmetic."""
    return "\n".join(
        [
            "## OpenMoE-8B on meshes, by arithmetic\n",
            made_by,
            f"Nothing is trained: GiB of the most costly rank, with {result['sequences_per_rank']} "
            f"sequences of {result['seq_len']} tokens for each rank in a step, float32 AdamW, "
            "bfloat16 products, blocks recomputed, eight ranks on a host.\n",
            openmoe_meshes.table(result),
            "",
        ]
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
