"""Write docs/benchmarks.md from the JSON files in benchmarks/results.

python benchmarks/page.py
"""

import json
from pathlib import Path
from typing import Any

import gpu_sections  # beside this file
import multi_sections
import router_sections

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
    sections = [INTRODUCTION, layer_cpu(load("layer_cpu")), layer_gpu(load("layer_gpu"))]
    for name, section in (
        ("bench_gpu", gpu_sections.beside_peers),
        ("loads_gpu", gpu_sections.loads),
        ("decode_gpu", gpu_sections.decode),
        ("multi_gpu", multi_sections.several_gpus),
    ):
        result = load(name)
        sections.append(section(result, made_by(result)))
    sections.append(moe_vs_dense(load("moe_vs_dense")))
    cost, trained = load("routing_cost"), load("routers")
    sections.append(router_sections.routing_cost(cost, made_by(cost)))
    sections.append(router_sections.routers(trained, made_by(trained)))
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
        words, number = result["targets"].get(name, ("", None))
        wanted = words if number is None else f"{words} {number:.2f}"
        lines.append(f"| {name} | {milliseconds:.1f} | {ratio:.2f} | {wanted} |")
    return "\n".join([*lines, ""])


def layer_gpu(result: dict[str, Any]) -> str:
    """The layer on one GPU against its matrix products and transformers."""
    contenders = list(next(iter(result["median_ms"].values()))["forward"])
    lines = [
        "## The layer on one GPU\n",
        made_by(result),
        "Milliseconds forward without gradient / forward and backward, medians, bfloat16; MiB held "
        f"between the two where measured. A large matrix product ran at "
        f"{result['matmul_tflops']:.0f} TFLOP/s, a copy at {result['copy_tb_per_s']:.2f} TB/s.\n",
        f"| shape (T, D, F, E, K) | {' | '.join(contenders)} | speed over bmm |",
        f"|---|{'---:|' * (len(contenders) + 1)}",
    ]
    for name, times in result["median_ms"].items():
        sizes = ", ".join(str(result["shapes"][name][letter]) for letter in "TDFEK")
        cells = [f"{name} ({sizes})"]
        for contender in contenders:
            cell = " / ".join(f"{row[contender]:.2f}" for row in times.values())
            saved = result["saved_mib"][name].get(contender)
            cells.append(cell if saved is None else f"{cell}, {saved:.0f}")
        cells.append(" / ".join(f"{x:.2f}" for x in result["bmm_speed_fraction"][name].values()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_decode(result["decode"]), ""])


def _decode(decoded: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    lines = [
        "Decoding steps of one layer: microseconds in a CUDA graph, without one, and the time to "
        "read the chosen experts' weights at the copy's speed as a share of the first.\n",
        "| shape | tokens | backend | graph | eager | bound | share |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name, rows in decoded.items():
        lines += [
            f"| {name} | {tokens} | {row['backend']} | {row['graph_us']:.0f} | "
            f"{row['eager_us']:.0f} | {row['bound_us']:.0f} | "
            f"{row['graph_fraction_of_bound']:.2f} |"
            for tokens, row in rows.items()
        ]
    return lines


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
        f"{dense['flops_per_token']:,}. The difference in FLOPs is the router's. The presets were "
        "chosen on other text: the MoE's from eleven short trials, the dense model's from three, "
        "one learning rate for both; so a small part of the gap may be choice."
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
