"""Every mesh against one process, in float64: results/equivalence.json and docs/equivalence.md.

    python benchmarks/equivalence.py           all of it, many minutes on two cores
    python benchmarks/equivalence.py openmoe   some settings, the others as they are in the JSON
    python benchmarks/equivalence.py --page    the page alone, from the JSON that is there

Models, batches and meshes are those of tests/distributed. Each mesh trains every setting that fits
it for five optimizer steps through the trainer, on as many gloo processes as it has ranks, and
again for two steps, which must agree to the bit.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import record  # noqa: E402  # beside this file
import torch  # noqa: E402

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


Errors = dict[str, dict[str, float]]
"""By setting and column."""


class Table:
    """All errors: those of an earlier run, replaced piece by piece.

    It is saved after each piece, so what is done is not lost when a run is cut. Layouts and
    settings that are no more are left out.

    Args:
        old: The earlier result, or nothing.
        folder: Of the JSON.
    """

    def __init__(self, old: dict[str, Any], folder: Path = record.RESULTS) -> None:
        self.old, self.folder = old, folder
        self.layouts: dict[str, Errors] = {
            name: _known(row["errors"]) for name, row in old.get("layouts", {}).items()
        }
        self.types: dict[str, dict[str, Errors]] = {
            title: {name: _known(errors) for name, errors in layouts.items()}
            for title, layouts in old.get("types", {}).items()
        }
        self._measured: set[str] = set()

    def put(self, layout: Layout, errors: Errors, title: str = "") -> None:
        """Take a layout's errors, in float64 or in the type of this title, and save."""
        rows = self.types.setdefault(title, {}) if title else self.layouts
        rows[layout.name] = _known(rows.get(layout.name, {}) | errors)
        self._measured |= {_part(setting, layout.name, title) for setting in errors}
        parts = [part for part in self._parts() if part not in self._measured]
        record.save(NAME, self.result(), self.folder, kept=record.stamps_of(self.old, parts))

    def result(self) -> dict[str, Any]:
        """What the JSON holds, in the order of the layouts and settings."""
        return {
            "limit": LIMIT,
            "settings": {name: setting.about for name, setting in SETTINGS.items()},
            "layouts": {
                layout.name: {"world": layout.world, "errors": self.layouts[layout.name]}
                for layout in LAYOUTS
                if self.layouts.get(layout.name)
            },
            "types": {title: self.types[title] for title in TYPES if title in self.types},
        }

    def _parts(self) -> list[str]:
        result = self.result()
        found = [
            _part(setting, name, "")
            for name, row in result["layouts"].items()
            for setting in row["errors"]
        ]
        return found + [
            _part(setting, name, title)
            for title, layouts in result["types"].items()
            for name, errors in layouts.items()
            for setting in errors
        ]


def _part(setting: str, layout: str, title: str) -> str:
    return f"{setting}: {layout}{f' in {title}' if title else ''}"


def _known(errors: Errors) -> Errors:
    return {name: errors[name] for name in SETTINGS if name in errors}


def measure(names: Sequence[str], table: Table) -> None:
    """Put errors of every layout in the settings of these names into the table."""
    for layout in LAYOUTS:
        start = time.perf_counter()
        errors = compare(layout, _of(names, layout), timeout=1800)
        worst = max((error for row in errors.values() for error in row.values()), default=0.0)
        seconds = time.perf_counter() - start
        print(f"{layout.world} ranks, {layout.name}: {worst:.1e}, {seconds:.0f} s", flush=True)
        table.put(layout, errors)
    for title, numbers in TYPES.items():
        for layout in LAYOUTS:
            if layout.name in MESHES_OF_TYPES:
                table.put(layout, compare(layout, _of(names, layout), numbers), title)


def _of(names: Sequence[str], layout: Layout) -> list[str]:
    return [name for name in suited(layout) if name in names]


def load() -> dict[str, Any]:
    """The result that is there."""
    return record.load(NAME)


def render(result: dict[str, Any]) -> str:
    """The page."""
    lines = [
        TEXT.format(limit=result["limit"]),
        record.made_by(result, "gloo", where=lambda hardware: hardware["cpu"]),
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
    if not arguments.page:
        old = record.load_if_there(NAME)
        measure(arguments.settings or list(SETTINGS), Table(old))
    PAGE.write_text(render(load()), encoding="utf-8")
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
