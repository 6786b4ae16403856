"""What works with what: ``python -m tests.routing.matrix`` prints the table of docs/routing.md."""

from typing import NamedTuple

from expertmesh.routing import ROUTER_PRESETS, router_preset
from tests.routing.registered import NAMES, WRAPPED

COMPILES = {"one": "one graph"}


class Row(NamedTuple):
    """The cells of a router; what the columns mean stands in docs/routing.md."""

    padding: str = "yes"
    ep: str = "yes"
    cp: str = "yes"
    tp: str = "yes"
    static: str = "no"
    capacity: str = "none"
    compile: str = COMPILES["one"]
    recompute: str = "yes"


REFUSALS = {
    "cp": "set cp=1 and tp=1",
    "tp": "set cp=1 and tp=1",
    "static": "static dispatch needs a router with a capacity",
}
"""What an error says where a cell is "no"."""

OTHERS: dict[str, Row] = {
    "noisy_top_k": Row(),
    "entropy": Row(),
    "hierarchical": Row(),
    "cosine": Row(capacity="any"),
    "expert_choice": Row(capacity="always full"),
    "batchwise": Row(capacity="always full"),
    "base": Row(static="in training", capacity="always full"),
    "sinkhorn": Row(),
    "hash": Row(),
    "thor": Row(),
    "uniform": Row(),
    "round_robin": Row(),
    "fixed": Row(),
    "PerSequence": Row(cp="no", tp="no", capacity="the router's"),
    "PerTask": Row(capacity="the router's"),
    "SoftMoE": Row(cp="no", tp="no", static="yes", capacity="always full"),
}


def _preset(name: str) -> Row:
    limited = router_preset(name, dim=8, num_experts=8 * 8).capacity is not None
    return Row(static="yes" if limited else "no", capacity="any")


MATRIX: dict[str, Row] = {**{name: _preset(name) for name in ROUTER_PRESETS}, **OTHERS}


def table() -> str:
    """One row for presets with and one for those without a capacity, and one for each other."""
    groups: dict[Row, list[str]] = {}
    for name, row in MATRIX.items():
        groups.setdefault(row, []).append(name)
    header = ("router", *(field if field != "static" else "static" for field in Row._fields))
    lines = [header, tuple("---" for _ in header)]
    for row, names in groups.items():
        presets = [name for name in names if name in ROUTER_PRESETS]
        others = [f"`{name}`" for name in names if name not in ROUTER_PRESETS]
        if presets:
            kind = "with a capacity" if row.static == "yes" else "without a capacity of their own"
            others = [f"presets {kind}", *others]
        lines.append((", ".join(others), *row))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


assert OTHERS.keys() == {*NAMES, *WRAPPED, "SoftMoE"} - ROUTER_PRESETS.keys()

if __name__ == "__main__":
    print(table())
