"""The section of docs/benchmarks.md on several GPUs; see ``page.py``."""

from types import ModuleType
from typing import Any

from multi import checkpoint, equivalence, layer, training  # beside this file

_PARTS: dict[str, tuple[ModuleType, str]] = {
    "equivalence": (
        equivalence,
        "Against one GPU: first losses, gradient norms and gradients, and parameters after five "
        "steps, largest relative error. In float32 two experts that nearly tie for a token may "
        "change places; in bfloat16 many do.",
    ),
    "layer": (
        layer,
        "One layer with its experts over the GPUs, bfloat16, medians. The all-to-all's speed is "
        "that of the bytes which leave a GPU over the time of its kernels, waiting for the other "
        "GPU included; beside it a plain exchange of as many bytes in the same run.",
    ),
    "training": (
        training,
        "Training steps, the batch growing with the GPUs; weak scaling is the speed of a GPU over "
        "that of one alone. Ours keeps float32 parameters under bfloat16 products, the rival "
        "bfloat16 parameters.",
    ),
    "checkpoint": (checkpoint, "A run saved on several GPUs and resumed on one."),
}


def several_gpus(result: dict[str, Any], made_by: str) -> str:
    """All four parts, each with what it is."""
    lines = [f"## {result['devices']} GPUs of one host\n", made_by]
    for name, (module, words) in _PARTS.items():
        lines += [words, "", *_apart(module.table(result[name])), ""]
    return "\n".join(lines)


def _apart(lines: list[str]) -> list[str]:
    """A blank line between text and table, which Markdown wants."""
    separated: list[str] = []
    for line in lines:
        if line.startswith("|") and separated and not separated[-1].startswith("|"):
            separated.append("")
        separated.append(line)
    return separated
