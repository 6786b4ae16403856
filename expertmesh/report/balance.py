"""How evenly the routers use their experts: load, drops, entropy and logits."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from expertmesh.errors import require
from expertmesh.report import style
from expertmesh.report.read import Floats, LayerRouting, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# With more cells than this, or more experts in a row, numbers in the heat map would not be read.
_MOST_NUMBERS = 320
_MOST_COLUMNS = 16
_MOST_LEGEND_LAYERS = 8
# Ends of the heat map's scale, and the labels that go with each.
_SCALES: dict[float, tuple[str, ...]] = {
    1.5: ("0.67", "1.0 = fair", "1.5"),
    2.0: ("0.5", "1.0 = fair", "2"),
    4.0: ("0.25", "0.5", "1.0 = fair", "2", "4"),
    8.0: ("0.125", "0.25", "0.5", "1.0 = fair", "2", "4", "8"),
}
# Stands for an expert that got nothing on the logarithmic scale.
_LEAST = 1e-3


def short_names(names: list[str]) -> list[str]:
    """The part of each dotted name that differs from the others, or all of it for a single name."""
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return names
    shared = min(len(part) for part in parts) - 1
    head = 0
    while head < shared and len({part[head] for part in parts}) == 1:
        head += 1
    tail = 0
    while tail < shared - head and len({part[-1 - tail] for part in parts}) == 1:
        tail += 1
    return [".".join(part[head : len(part) - tail]) for part in parts]


def _layer_labels(routing: tuple[LayerRouting, ...]) -> list[str]:
    labels = short_names([layer.name for layer in routing])
    return [f"layer {label}" if label.isdigit() else label for label in labels]


def load(run: Run) -> "Figure | None":
    """Layer-by-expert heat map of load / fair share at the end of the run."""
    if not run.routing:
        return None
    most = max(layer.num_experts for layer in run.routing)
    ratio = np.full((len(run.routing), most), np.nan)
    for row, layer in enumerate(run.routing):
        ratio[row, : layer.num_experts] = layer.settled_E
    figure = style.figure(1.5 + min(max(0.42 * len(run.routing), 0.9), 12.0))
    axes = figure.subplots()
    image = _heat_map(axes, ratio)
    axes.set_yticks(range(len(run.routing)), _layer_labels(run.routing))
    axes.set_xticks(range(0, most, max(1, math.ceil(most / 32))))
    axes.set_xlabel("expert")
    axes.set_title(f"Load / fair share, {run.routing[0].settled_steps}")
    _colour_scale(figure, axes, image, ratio)
    if ratio.size <= _MOST_NUMBERS and most <= _MOST_COLUMNS:
        _write_numbers(axes, ratio)
    return figure


def _bound(ratio: Floats) -> float:
    """The colour scale spans 1/bound to bound: a few fixed scales, so that runs compare."""
    known = ratio[np.isfinite(ratio)]
    worst = max(known.max(initial=1.0), 1.0 / max(known.min(initial=1.0), _LEAST))
    return next((bound for bound in _SCALES if worst <= bound), max(_SCALES))


def _heat_map(axes: "Axes", ratio: Floats) -> "AxesImage":
    """Half and twice the fair share are equally far from white: the scale is logarithmic."""
    bound = math.log2(_bound(ratio))
    colours = require("matplotlib", extra="report").colormaps["RdBu_r"].with_extremes(bad="#E6E8EB")
    image = axes.imshow(
        np.log2(np.maximum(ratio, _LEAST)), cmap=colours, vmin=-bound, vmax=bound, aspect="auto"
    )
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    rows, columns = ratio.shape
    # White lines between the cells, drawn with the minor ticks.
    axes.set_xticks(np.arange(-0.5, columns), minor=True)
    axes.set_yticks(np.arange(-0.5, rows), minor=True)
    axes.grid(True, which="minor", color="white", linewidth=1.5 if columns <= 64 else 0.4)
    axes.tick_params(which="minor", length=0)
    return image


def _colour_scale(figure: "Figure", axes: "Axes", image: "AxesImage", ratio: Floats) -> None:
    bound = _bound(ratio)
    known = ratio[np.isfinite(ratio)]
    beyond = (bool((known < 1 / bound).any()), bool((known > bound).any()))
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
    bar = figure.colorbar(
        image,
        ax=axes,
        extend=extend.get(beyond, "neither"),
        pad=0.02,
        fraction=0.04,
        aspect=min(6.0 + 1.5 * len(ratio), 40.0),
    )
    labels = _SCALES[bound]
    top = math.log2(bound)
    bar.set_ticks(list(np.linspace(-top, top, len(labels))), labels=list(labels))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _write_numbers(axes: "Axes", ratio: Floats) -> None:
    darkest = 0.62 * math.log2(_bound(ratio))
    for (row, column), value in np.ndenumerate(ratio):
        if np.isfinite(value):
            dark = abs(math.log2(max(value, _LEAST))) > darkest
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=9.5,
                color="white" if dark else style.INK,
            )


def load_over_time(run: Run) -> "Figure | None":
    """One panel for each layer: every expert's load, and the band from the least to the most."""
    if not run.routing:
        return None
    num_layers = len(run.routing)
    num_columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}.get(num_layers, 4)
    num_rows = math.ceil(num_layers / num_columns)
    figure = style.figure(0.8 + (2.4 if num_columns <= 2 else 1.9) * num_rows)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True, sharey=True)
    for axes, layer, label in zip(grid.flat, run.routing, _layer_labels(run.routing), strict=False):
        _draw_load(axes, layer, most_labels=max(3, 7 - num_columns))
        axes.set_title(label)
    for axes in grid.flat[num_layers:]:
        axes.set_visible(False)
        # The last label of the panel above stands half beyond its corner.
        style.keep_free(figure, right=0.02)
    for axes in grid[:, 0]:
        axes.set_ylabel("load / fair share")
    for column in range(num_columns):
        row = (num_layers - 1 - column) // num_columns
        grid[row, column].set_xlabel("optimizer step")
        grid[row, column].tick_params(labelbottom=True)
        # Labels above an empty place may use it, and need no room between the rows.
        grid[row, column].xaxis.set_in_layout(row == num_rows - 1)
    grid[0, 0].set_ylim(bottom=0.0)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    style.legend_above(figure, handles, labels)
    return figure


def _draw_load(axes: "Axes", layer: LayerRouting, *, most_labels: int) -> None:
    ratio = layer.ratio_SE
    least, most = ratio.min(axis=1), ratio.max(axis=1)
    marker = "o" if len(layer.step) == 1 else ""
    axes.fill_between(layer.step, least, most, color=style.GREY, alpha=0.13, linewidth=0)
    # Many lines on top of each other show their density only if each is faint.
    faint = min(0.55, 5.0 / layer.num_experts)
    lines = axes.plot(layer.step, ratio, color=style.GREY, alpha=max(faint, 0.08), linewidth=0.7)
    lines[0].set_label("each expert")
    axes.plot(layer.step, most, color=style.RED, linewidth=1.3, marker=marker, label="max / fair")
    axes.plot(layer.step, least, color=style.BLUE, linewidth=1.3, marker=marker, label="min / fair")
    axes.axhline(1.0, color=style.INK, linewidth=1.0, linestyle=(0, (4, 3)), label="fair share")
    style.step_axis(axes, layer.step, most_labels=most_labels)
    axes.set_xlabel("")


def drops(run: Run) -> "Figure | None":
    """Dropped share over time and by position, or None where nothing was dropped."""
    if not any((layer.dropped > 0).any() for layer in run.routing):
        return None
    figure = style.figure(3.6)
    over_time, by_position = figure.subplots(1, 2)
    colours = style.by_depth(len(run.routing))
    for layer, colour in zip(run.routing, colours, strict=True):
        over_time.plot(layer.step, 100 * layer.dropped, color=colour, linewidth=1.3)
        logged = np.isfinite(layer.dropped_by_position).all(axis=1)
        weight = layer.load_SE[logged].sum(axis=1)
        if layer.dropped_by_position.shape[1] and weight.sum() > 0:
            edges = np.linspace(0, 100, layer.dropped_by_position.shape[1] + 1)
            share = 100 * weight @ layer.dropped_by_position[logged] / weight.sum()
            by_position.stairs(share, edges, baseline=None, color=colour, linewidth=1.6)
    over_time.set_title("Over the run")
    over_time.set_ylabel("dropped assignments (%)")
    style.step_axis(over_time, run.routing[0].step)
    by_position.set_title("By position, whole run")
    by_position.set_xlabel("position in the sequence (% of its length)")
    by_position.set_xlim(0, 100)
    for axes in (over_time, by_position):
        axes.set_ylim(bottom=0.0)
    layer_legend(figure, run.routing, colours)
    return figure


def entropy(run: Run) -> "Figure | None":
    """Router entropy over time, and the largest router logit."""
    panels = [
        ("entropy", "Router entropy", "nats per token"),
        ("max_logit", "Largest router logit", "absolute value"),
    ]
    present = [
        panel
        for panel in panels
        if any(np.isfinite(getattr(layer, panel[0])).any() for layer in run.routing)
    ]
    if not present:
        return None
    figure = style.figure(3.6)
    colours = style.by_depth(len(run.routing))
    for axes, (key, title, unit) in zip(
        figure.subplots(1, len(present), squeeze=False)[0], present, strict=True
    ):
        for layer, colour in zip(run.routing, colours, strict=True):
            marker = "o" if len(layer.step) == 1 else ""
            axes.plot(layer.step, getattr(layer, key), color=colour, linewidth=1.3, marker=marker)
        axes.set_title(title)
        axes.set_ylabel(unit)
        style.step_axis(axes, run.routing[0].step)
        if key == "entropy":
            _mark_uniform(axes, run.routing)
    layer_legend(figure, run.routing, colours)
    return figure


def _mark_uniform(axes: "Axes", routing: tuple[LayerRouting, ...]) -> None:
    """A line at the entropy of a router that does not choose at all, ln(E)."""
    for num_experts in sorted({layer.num_experts for layer in routing}):
        top = math.log(num_experts)
        axes.axhline(top, color=style.INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            f"uniform over {num_experts} experts, ln {num_experts} = {top:.2f}",
            (1.0, top),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=9.5,
        )
    axes.set_ylim(bottom=0.0, top=1.14 * math.log(max(layer.num_experts for layer in routing)))


def layer_legend(figure: "Figure", routing: tuple[LayerRouting, ...], colours: list[Any]) -> None:
    """Which colour is which layer: by name for a few, by a range of depth for many."""
    lines = require("matplotlib.lines", extra="report")
    labels = _layer_labels(routing)
    shown = list(range(len(routing)))
    if len(routing) > _MOST_LEGEND_LAYERS:
        shown = [round(i) for i in np.linspace(0, len(routing) - 1, 5)]
    handles = [lines.Line2D([], [], color=colours[i]) for i in shown]
    style.legend_above(figure, handles, [labels[i] for i in shown])
