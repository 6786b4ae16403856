"""How every figure of a report looks: one size, one palette, one kind of axis.

Figures are matplotlib ``Figure`` objects of their own, drawn without a display and without pyplot's
global list of figures. The colours are told apart by colour-blind readers (Okabe and Ito, 2008).
"""

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.errors import require
from expertmesh.report.read import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = "#0072B2"
RED = "#D55E00"
GREY = "#8A8F98"
INK = "#24292F"

# At 100 % a page shows a figure of WIDTH inches in 960 CSS pixels: 10.5 points read as 14 pixels.
WIDTH = 9.6
_DPI = 160

_RC = {
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.titlesize": 11.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "legend.fontsize": 10.0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    # A "$" in a layer's or a run's name is a letter, not the start of a formula.
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
}


def applied() -> AbstractContextManager[None]:
    """The style, for the figures drawn inside the ``with``; the user's own is back after it.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="report")
    context: AbstractContextManager[None] = matplotlib.rc_context(_RC)
    return context


def figure(height: float) -> "Figure":
    """An empty figure of the report's width.

    Args:
        height: In inches.
    """
    figure_class: type[Figure] = require("matplotlib.figure", extra="report").Figure
    return figure_class(figsize=(WIDTH, height), dpi=_DPI, layout="constrained")


def png(drawn: "Figure") -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    backend = require("matplotlib.backends.backend_agg", extra="report")
    buffer = io.BytesIO()
    backend.FigureCanvasAgg(drawn).print_png(
        buffer, metadata={"Software": None}, pil_kwargs={"optimize": True}
    )
    return buffer.getvalue()


def step_axis(axes: "Axes", steps: NDArray[Any], *, most_labels: int = 5) -> None:
    """Name the horizontal axis of an ``axes`` that shows ``steps``, and fit it to them."""
    ticker = require("matplotlib.ticker", extra="report")
    axes.set_xlabel("optimizer step")
    locator = ticker.MaxNLocator(most_labels, integer=True, steps=[1, 2, 5, 10])
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    first, last = int(steps[0]), int(steps[-1])
    margin = 0.02 * (last - first) or 1.0
    axes.set_xlim(first - margin, last + margin)


def legend_above(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, over them, where it hides no line."""
    legend = figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(max(handle.get_alpha() or 1.0, 0.5))


def keep_free(figure: "Figure", *, right: float) -> None:
    """Leave a part of the width, from 0 to 1, empty at the right edge."""
    engine = require("matplotlib.layout_engine", extra="report").ConstrainedLayoutEngine
    figure.set_layout_engine(engine(rect=(0.0, 0.0, 1.0 - right, 1.0)))


def by_depth(num_layers: int) -> list[Any]:
    """A colour for each layer, from dark (first) to light (last), even in lightness."""
    matplotlib = require("matplotlib", extra="report")
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, num_layers))
    return list(colours)


def moving_mean(value: Floats, width: int) -> Floats:
    """Centred mean over ``width`` points (odd), over fewer at the ends; NaN is left out."""
    half = width // 2
    known = np.isfinite(value)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, value, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(value)) - half, 0)
    high = np.minimum(np.arange(len(value)) + half + 1, len(value))
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = (total[high] - total[low]) / (count[high] - count[low])
    return mean
