"""Write docs/benchmarks.md from the JSON files in benchmarks/results.

python benchmarks/page.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_sections  # beside this file
import kernel_sections
import multi_sections
import openmoe_sections
import router_sections
from record import RESULTS, load_if_there, made_by

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

Made by `python benchmarks/page.py` from the files in `benchmarks/results/`, each of which holds the
command, commit, hardware and versions that it was measured with. Machines are noisy: within one
file contenders ran side by side, and ratios say more than times. What a file keeps of earlier runs
is named below its command, with theirs.
"""


def render(folder: Path = RESULTS) -> str:
    """The page: a section for each result that is there."""
    sections = [INTRODUCTION]
    for name, section in SECTIONS.items():
        if result := load_if_there(name, folder):
            sections.append(section(result, made_by(result)))
    return "\n".join(sections)


def layer_cpu(result: dict[str, Any], made_by: str) -> str:
    """The layer on a CPU against others."""
    lines = [
        "## The layer on a CPU, forward and backward\n",
        made_by,
        "| contender | ms, median | times ours | wanted |",
        "|---|---:|---:|---|",
    ]
    for name, milliseconds in result["median_ms"].items():
        ratio = result["ratio_of_medians_to_expertmesh"][name]
        words, number = result["targets"].get(name, ("", None))
        wanted = words if number is None else f"{words} {number:.2f}"
        lines.append(f"| {name} | {milliseconds:.1f} | {ratio:.2f} | {wanted} |")
    return "\n".join([*lines, ""])


def moe_vs_dense(result: dict[str, Any], made_by: str) -> str:
    """The demo's MoE against a dense model of equal active FLOPs."""
    lines = [
        "## The demo's MoE against a dense model of equal active FLOPs\n",
        made_by,
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
        "chosen on other text, in about eleven short trials of the MoE and three of the dense "
        "model, from runs that were not kept, with one learning rate for both; so a small part of "
        "the gap may be choice."
    )
    return "\n".join([*lines, ""])


def gpu_tests(result: dict[str, Any], made_by: str) -> str:
    """The tests that need a GPU."""
    counts = result["tests"]
    return (
        "## Tests on a GPU\n\n"
        + made_by
        + f"\n{counts['passed']} passed, {counts['failed']} failed.\n"
    )


SECTIONS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "layer_cpu": layer_cpu,
    "layer_gpu": gpu_sections.layer,
    "bench_gpu": gpu_sections.beside_peers,
    "products_gpu": kernel_sections.one_by_one,
    "energy_gpu": kernel_sections.energy,
    "block_sparse_gpu": kernel_sections.block_sparse,
    "tune_fused": kernel_sections.tuned,
    "loads_gpu": gpu_sections.loads,
    "decode_gpu": gpu_sections.decode,
    "cross_entropy_gpu": kernel_sections.cross_entropy,
    "step_gpu": gpu_sections.step,
    "step_gpu_float32": gpu_sections.step,
    "multi_gpu": multi_sections.several_gpus,
    "openmoe_gpu": openmoe_sections.one_gpu,
    "openmoe_load": openmoe_sections.loading,
    "openmoe_meshes": openmoe_sections.meshes,
    "moe_vs_dense": moe_vs_dense,
    "routing_cost": router_sections.routing_cost,
    "routers": router_sections.routers,
    "gpu_tests": gpu_tests,
}
"""By result, in the page's order; ``equivalence`` has a page of its own."""


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"written to {PAGE}")
