"""Every mesh against one process, in float64: results/equivalence.json and docs/equivalence.md.

    python benchmarks/equivalence.py           all of it, many minutes on two cores
    python benchmarks/equivalence.py openmoe   some settings, the others as they are in the JSON
    python benchmarks/equivalence.py --page    the page alone, from the JSON that is there

Models, batches and meshes are those of tests/distributed. Each mesh trains every setting that fits
it for five optimizer steps through the trainer, on as many gloo processes as it has ranks, and
again for two steps, which must agree to the bit.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from record import RESULTS, save  # noqa: E402  # beside this file

from expertmesh.testing.equivalence import COLUMNS  # noqa: E402
from tests.distributed.compared import LIMIT, compare, suited  # noqa: E402
from tests.distributed.layouts import LAYOUTS, Layout  # noqa: E402
from tests.distributed.settings import SETTINGS  # noqa: E402
from tests.distributed.training import Numbers  # noqa: E402

NAME = "equivalence"
PAGE = ROOT / "docs" / "equivalence.md"

TEXT = """\
# The same numbers on every mesh

Models trained on many ranks are compared with the same models in one process: the first step's
output, the gradient of its input (the embedded tokens) and of every parameter, and over five steps
of AdamW the gradient's norm before clipping, the loss, and in the end all parameters and buffers.
A cell is the largest relative error, by norm, over all parameters and over all settings below that
fit the mesh; in float64 everything up to {limit:.0e} counts as rounding. On one mesh two runs agree
to the bit: each setting is trained twice, and copies of a parameter on several ranks must be equal.
"""

OTHER_TYPES = """\
## In other number types

Sums over ranks are taken in another order than in one process, so other types agree to their own
rounding: the same cells for three meshes. In bfloat16 (autocast, float32 parameters) a router's
choices fall otherwise where two experts are nearly equal, and from there on the two runs are
different ones; the biases that balance experts move by whole steps.
"""

TYPES = {
    "float32": Numbers(torch.float32),
    "bfloat16": Numbers(torch.float32, "bf16"),
}
MESHES_OF_TYPES = ("ep2 zero1/0", "tp2 ep2 zero2", "edp2 ep2 zero3")


def measure(names: Sequence[str]) -> dict[str, Any]:
    """Errors of every layout in the settings of these names."""
    layouts = {}
    for layout in LAYOUTS:
        start = time.perf_counter()
        errors = compare(layout, _of(names, layout), timeout=1800)
        worst = max((error for row in errors.values() for error in row.values()), default=0.0)
        seconds = time.perf_counter() - start
        print(f"{layout.world} ranks, {layout.name}: {worst:.1e}, {seconds:.0f} s", flush=True)
        layouts[layout.name] = {"world": layout.world, "errors": errors}
    settings = {name: setting.about for name, setting in SETTINGS.items()}
    types = measure_types(names)
    return {"limit": LIMIT, "settings": settings, "layouts": layouts, "types": types}


def _of(names: Sequence[str], layout: Layout) -> list[str]:
    return [name for name in suited(layout) if name in names]


def measure_types(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Errors of a few layouts in other types than float64."""
    chosen = [layout for layout in LAYOUTS if layout.name in MESHES_OF_TYPES]
    return {
        title: {layout.name: compare(layout, _of(names, layout), numbers) for layout in chosen}
        for title, numbers in TYPES.items()
    }


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new result, and from the old one what it has of settings that were not measured."""
    for name, row in new["layouts"].items():
        row["errors"] = _merged(old["layouts"].get(name, {}).get("errors", {}), row["errors"])
    for title, layouts in new["types"].items():
        for name in layouts:
            layouts[name] = _merged(old["types"].get(title, {}).get(name, {}), layouts[name])
    return new


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """In the order of the settings; those that are no more are left out."""
    both = {**old, **new}
    return {name: both[name] for name in SETTINGS if name in both}


def load() -> dict[str, Any]:
    """The result that is there."""
    content: dict[str, Any] = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    return content


def render(result: dict[str, Any]) -> str:
    """The page."""
    versions, hardware = result["versions"], result["hardware"]
    commit, plus, changes = result["commit"].partition("+")
    lines = [
        TEXT.format(limit=result["limit"]),
        f"`{result['command']}`, commit {commit[:10]}{plus}{changes}, {hardware['cpu']}, torch "
        f"{versions['torch']}, gloo, {result['date'][:10]}\n",
        f"| ranks | mesh | settings | {' | '.join(COLUMNS)} |",
        f"|---:|---|---:|{'---:|' * len(COLUMNS)}",
    ]
    for name, row in result["layouts"].items():
        errors = row["errors"]
        lines.append(f"| {row['world']} | {name} | {len(errors)} | {_figures(errors)} |")
    lines += [
        "",
        "`zero2/1` is ZeRO stage 2 with stage 1 for the experts; `outside` places the ranks of an "
        "expert-parallel group on different hosts; `interleaved2` gives each rank two pipeline "
        "stages; `static` is dispatch without host synchronisation. Axes that are not named are "
        "inferred.\n",
        "| setting | what it is |",
        "|---|---|",
        *(f"| {name} | {about} |" for name, about in result["settings"].items()),
        "",
        OTHER_TYPES,
        f"| type | mesh | {' | '.join(COLUMNS)} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    for title, layouts in result["types"].items():
        lines += [f"| {title} | {name} | {_figures(e)} |" for name, e in layouts.items()]
    return "\n".join([*lines, ""])


def _figures(errors: dict[str, dict[str, float]]) -> str:
    cells = [max(row[column] for row in errors.values()) for column in COLUMNS]
    return " | ".join(f"{cell:.0e}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page from the JSON alone")
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    arguments = parser.parse_args()
    for name in arguments.settings:
        if name not in SETTINGS:
            parser.error(f"setting must be one of {', '.join(SETTINGS)}, got {name!r}")
    if arguments.settings:
        print(f"written to {save(NAME, merge(load(), measure(arguments.settings)))}")
    elif not arguments.page:
        print(f"written to {save(NAME, measure(list(SETTINGS)))}")
    PAGE.write_text(render(load()), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
