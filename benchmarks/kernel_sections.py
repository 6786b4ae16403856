"""The sections of docs/benchmarks.md on kernels by themselves; see ``page.py``."""

from typing import Any

_DIRECTIONS = ("forward", "forward and backward")


def tuned(result: dict[str, Any], made_by: str) -> str:
    """The fastest candidate of each product."""
    times = result["median_ms"]
    products = list(dict.fromkeys(name for row in times.values() for name in row))
    lines = [
        "## Products of the fused experts, tuned\n",
        made_by,
        "Milliseconds of the fastest candidate, medians, bfloat16, a random router's row counts. A "
        "tile is rows x columns x depth, w warps, s stages, p programs on a multiprocessor, g row "
        "tiles together, c chunks, r registers, f flattened; `turns` are two warpgroups.\n",
        f"| shape | {' | '.join(products)} |",
        f"|---|{'---:|' * len(products)}",
    ]
    for name, row in times.items():
        cells = []
        for product in products:
            found = row.get(product)
            best = min(found, key=found.__getitem__) if found else None
            cells.append("" if best is None else f"{found[best]:.2f} {best}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def one_by_one(result: dict[str, Any], made_by: str) -> str:
    """Every kernel of a step, beside another library's."""
    kernels = result["kernels"]
    who = list(dict.fromkeys(name for row in kernels.values() for name in row))
    lines = [
        "## The kernels of the layer's step one by one\n",
        made_by,
        "Milliseconds of all kernels together, a step at a time under torch's profiler, medians, "
        "bfloat16; and how many kernels they are. Gaps between them are not in it.\n",
        f"| shape | {' | '.join(who)} |",
        f"|---|{'---:|' * len(who)}",
    ]
    for shape, row in kernels.items():
        cells = [
            f"{sum(ms for _, ms in row[name]):.2f}, {len(row[name])}" if name in row else ""
            for name in who
        ]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def energy(result: dict[str, Any], made_by: str) -> str:
    """What steps and products cost beside time."""
    lines = [
        "## Energy of the layer's step on one GPU\n",
        made_by,
        "Each alone until clock and power have settled, bfloat16: milliseconds, the clock, power "
        "as the driver tells it, and their product. `bmm` are cuBLAS's products of equal FLOPs.\n",
        "| shape | | ms | MHz | W | J |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape, rows in result["rows"].items():
        for who, row in rows.items():
            figures = f"{row['ms']:.2f} | {row['mhz']} | {row['watts']} | {row['joules']:.3f}"
            lines.append(f"| {shape} | {who} | {figures} |")
    return "\n".join([*lines, ""])


def cross_entropy(result: dict[str, Any], made_by: str) -> str:
    """The output layer and the loss."""
    table = result["by_tokens"]
    ways = list(dict.fromkeys(way for row in table.values() for way in row))
    lines = [
        "## Output layer and loss on one GPU\n",
        made_by,
        f"{result['words']:,} words, width {result['dim']}, bfloat16 products over float32 "
        "weights, forward and backward: milliseconds, and MiB needed beyond the inputs, gradients "
        "included. All at once is autograd through the definition, the others hold so many logits "
        "at a time.\n",
        f"| tokens | {' | '.join(ways)} |",
        f"|---:|{'---:|' * len(ways)}",
    ]
    for tokens, row in table.items():
        cells = [_pass(row[way]) if way in row else "" for way in ways]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _pass(found: dict[str, float] | None) -> str:
    return "does not fit" if found is None else f"{found['ms']:.1f}, {found['peak_mib']:,}"


def block_sparse(result: dict[str, Any], made_by: str) -> str:
    """Block-sparse products beside the grouped backends."""
    times = result["median_ms"]
    lines = [
        "## Experts as block-sparse products on one GPU\n",
        made_by,
        f"Blocks of {result['block']}, {result['dtype']}, experts drawn uniformly. Milliseconds "
        "forward without gradient / forward and backward, medians; MiB held between the two.\n",
        *_backends(times, result["saved_mib"]),
        "\nExperts of different widths, from half to three halves of the shape's: their "
        "block-sparse products, and the grouped backends with every expert padded to the widest.\n",
        *_backends({name: row["median_ms"] for name, row in result["unequal"].items()}, {}),
        "",
    ]
    for name, parts in result["parts_ms"].items():
        words = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items())
        error = max(result["relative_error"][name].values())
        lines.append(
            f"- {name}: {words} ms of the forward pass; outputs and gradients within {error:.0e} "
            "of the first grouped backend's."
        )
    return "\n".join([*lines, ""])


def _backends(times: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    who = list(dict.fromkeys(name for row in times.values() for name in row[_DIRECTIONS[0]]))
    lines = [f"| shape | {' | '.join(who)} |", f"|---|{'---:|' * len(who)}"]
    for shape, row in times.items():
        cells = []
        for name in who:
            if name not in row[_DIRECTIONS[0]]:
                cells.append("")
                continue
            cell = " / ".join(f"{row[direction][name]:.2f}" for direction in _DIRECTIONS)
            mib = saved.get(shape, {}).get(name)
            cells.append(cell if mib is None else f"{cell}, {mib:.0f}")
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return lines
