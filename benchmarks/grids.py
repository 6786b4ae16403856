"""Draw the two grids over eight ranks: docs/images/grids.png.

    python benchmarks/grids.py

The ranks of two hosts of four, with ep=4: beside each other ("inside") and apart ("outside").
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from expertmesh.parallel.grid import Grid

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "grids.png"
WORLD, PER_HOST, EP, TP = 8, 4, 2, 2
# Distinct in light and in grey, and for readers who do not tell red from green.
FILLS = ("#cfe3f5", "#f7d9b6", "#d9ead3", "#e6d6ec")
INK = "#22303c"


def main() -> None:
    inside = Grid.infer(WORLD, tp=TP, ep=EP)
    outside = Grid.infer(WORLD, tp=TP, ep=EP, placement="outside")
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2))
    draw(axes[0], inside, ("dp", "tp"), f"dense grid: dp=4, tp={TP}")
    draw(axes[1], inside, ("edp", "ep"), f"expert grid: edp=4, ep={EP}, inside")
    draw(axes[2], outside, ("edp", "ep"), f"expert grid: edp=4, ep={EP}, outside")
    figure.tight_layout(w_pad=2.5)
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=150)
    print(IMAGE)


def draw(ax: Axes, grid: Grid, names: tuple[str, str], title: str) -> None:
    """One column of ranks for each host; the colour is the place along the second axis."""
    outer, inner = names
    for host in range(WORLD // PER_HOST):
        ax.add_patch(
            Rectangle((host * 1.5 - 0.1, -0.1), 1.2, PER_HOST + 0.2, fill=False, ls=":", ec=INK)
        )
        ax.text(host * 1.5 + 0.5, PER_HOST + 0.2, f"host {host}", ha="center", color=INK)
    for rank in range(WORLD):
        host, row = divmod(rank, PER_HOST)
        place = grid.coordinates(rank)
        corner = (host * 1.5 + 0.06, PER_HOST - 1 - row + 0.08)
        fill = FILLS[place[inner]]
        ax.add_patch(
            FancyBboxPatch(corner, 0.88, 0.84, boxstyle="round,pad=0,rounding_size=0.1", fc=fill,
                           ec=INK)
        )  # fmt: skip
        middle = corner[0] + 0.44
        ax.text(middle, corner[1] + 0.55, f"rank {rank}", ha="center", va="center", color=INK)
        ax.text(
            middle,
            corner[1] + 0.22,
            f"{outer} {place[outer]}, {inner} {place[inner]}",
            ha="center",
            va="center",
            fontsize=7,
            color=INK,
        )
    ax.set_title(title, fontsize=11, color=INK)
    ax.set_xlim(-0.2, 2.75)
    ax.set_ylim(-0.3, PER_HOST + 0.7)
    ax.set_aspect("equal")
    ax.axis("off")


if __name__ == "__main__":
    main()
