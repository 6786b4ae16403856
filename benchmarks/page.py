"""Write docs/benchmarks.md from the JSON files in benchmarks/results.

python benchmarks/page.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

Made by `python benchmarks/page.py` from the files in `benchmarks/results/`, each of which holds the
command, commit, hardware and versions that it was measured with. Machines are noisy: within one
file contenders ran side by side, and ratios say more than times.
"""


def render() -> str:
    """The page."""
    sections = [INTRODUCTION, layer_cpu(load("layer_cpu")), moe_vs_dense(load("moe_vs_dense"))]
    return "\n".join([*sections, gpu_tests(load("gpu_tests"))])


def load(name: str) -> dict[str, Any]:
    """One result."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def made_by(result: dict[str, Any]) -> str:
    """Where the numbers of a section come from."""
    hardware, versions = result["hardware"], result["versions"]
    commit, plus, changes = result["commit"].partition("+")
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['threads']} threads"
    return (
        f"`{result['command']}`, commit {commit[:10]}{plus}{changes}, {machine}, "
        f"torch {versions['torch']}, {result['date'][:10]}\n"
    )


def layer_cpu(result: dict[str, Any]) -> str:
    """The layer on a CPU against others."""
    lines = [
        "## The layer on a CPU, forward and backward\n",
        made_by(result),
        "| contender | ms, median | times ours | wanted |",
        "|---|---:|---:|---|",
    ]
    for name, milliseconds in result["median_ms"].items():
        ratio = result["ratio_of_medians_to_expertmesh"][name]
        wanted = " ".join(str(part) for part in result["targets"].get(name, ()))
        lines.append(f"| {name} | {milliseconds:.1f} | {ratio:.2f} | {wanted} |")
    return "\n".join([*lines, ""])


def moe_vs_dense(result: dict[str, Any]) -> str:
    """The demo's MoE against a dense model of equal active FLOPs."""
    lines = [
        "## The demo's MoE against a dense model of equal active FLOPs\n",
        made_by(result),
        "Validation loss in nats per token (a byte or an end of document) after the last step.\n",
        "| seed | MoE | dense | difference |",
        "|---:|---:|---:|---:|",
    ]
    for row in result["runs"]:
        moe, dense = row["nano"]["val_loss"], row["nano-dense"]["val_loss"]
        lines.append(f"| {row['seed']} | {moe:.4f} | {dense:.4f} | {moe - dense:+.4f} |")
    moe, dense = result["runs"][0]["nano"], result["runs"][0]["nano-dense"]
    lines.append(
        f"\n{moe['steps']} steps. MoE: {moe['num_params']:,} parameters, "
        f"{moe['flops_per_token']:,} FLOPs per token forward; dense: {dense['num_params']:,} and "
        f"{dense['flops_per_token']:,}. The difference in FLOPs is the router's."
    )
    return "\n".join([*lines, ""])


def gpu_tests(result: dict[str, Any]) -> str:
    """The tests that need a GPU."""
    counts = result["tests"]
    return (
        "## Tests on a GPU\n\n"
        + made_by(result)
        + f"\n{counts['passed']} passed, {counts['failed']} failed.\n"
    )


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"written to {PAGE}")
