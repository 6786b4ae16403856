"""Draw time and memory by number of tokens: docs/images/loads.png.

    python benchmarks/loads_figure.py

From results/loads_gpu.json, which ``loads_gpu.py`` writes.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from record import load  # beside this file

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "loads.png"
MARKS = {"expertmesh": "o-", "one-hot einsum": "s--"}
COLOURS = {"expertmesh": "#1f5f99", "one-hot einsum": "#c26a1b"}


def main() -> None:
    tokens = load("loads_gpu")["tokens"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for ax, unit, label in ((axes[0], "ms", "milliseconds"), (axes[1], "peak MiB", "peak MiB")):
        for who, mark in MARKS.items():
            key = f"{who}, {unit}"
            points = [(int(number), row[key]) for number, row in tokens.items() if key in row]
            ax.loglog(*zip(*points, strict=True), mark, color=COLOURS[who], label=who)
        ax.set_xlabel("tokens")
        ax.set_ylabel(label)
        ax.grid(visible=True, which="major", alpha=0.3)
    axes[0].legend(frameon=False)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(IMAGE, dpi=150)
    print(IMAGE)


if __name__ == "__main__":
    main()
