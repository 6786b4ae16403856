"""The section of docs/benchmarks.md on several GPUs; see ``page.py``."""

from types import ModuleType
from typing import Any

from multi import checkpoint, equivalence, layer, spread, training  # beside this file

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
        "that of the bytes which leave a GPU over the time, waiting for the other GPU included; "
        "then with GPUs that meet before each; beside them a plain exchange of as many bytes in "
        "the same run, and the fraction of it (with waiting where no meeting was timed). Wanted: "
        f"at least {layer.AIM:.2f} of the plain one, and a host that waits once, or with static "
        "dispatch never.",
    ),
    "training": (
        training,
        "Training steps, the batch growing with the GPUs; weak scaling is the speed of a GPU over "
        "that of one alone. Ours keeps float32 parameters under bfloat16 products, the rival "
        "float32 parameters that are gathered as bfloat16. Wanted: weak scaling of at least "
        f"{training.AIM:.2f} by the best of our ways.",
    ),
    "checkpoint": (checkpoint, "A run saved on several GPUs and resumed on one."),
    "openmoe": (
        spread,
        "OpenMoE 8B loaded by `from_pretrained` in one process: on one GPU, and over all of them "
        "by `device_map`. Wanted: the same text, greedily written, and blocks on the other GPUs.",
    ),
}


def several_gpus(result: dict[str, Any], made_by: str) -> str:
    """The parts that are there, each with what it is, what was wanted of it and what misses it."""
    lines = [f"## {result['devices']} GPUs of one host\n", made_by]
    for name, (module, words) in _PARTS.items():
        if name not in result:
            continue
        lines += [words, "", *_apart(module.table(result[name])), ""]
        if missed := module.failures(result[name]):
            lines += ["Missed:\n", *(f"- {failure}" for failure in missed), ""]
    return "\n".join(lines)


def _apart(lines: list[str]) -> list[str]:
    """A blank line between text and table, which Markdown wants."""
    separated: list[str] = []
    for line in lines:
        if separated and line.startswith("|") != separated[-1].startswith("|"):
            separated.append("")
        separated.append(line)
    return separated
