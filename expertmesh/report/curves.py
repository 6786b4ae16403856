"""Curves over the steps of a run: loss, learning rate, gradient norm, speed and memory."""

from typing import TYPE_CHECKING

import numpy as np

from expertmesh.errors import require
from expertmesh.report import style
from expertmesh.report.read import Floats, Run, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fewer logged steps than this need no second look at the end of the run.
_ENOUGH_TO_ZOOM = 20


def smoothing_width(num_points: int) -> int:
    """How many logged steps the smooth line averages: a twentieth of them, odd."""
    return 2 * (num_points // 40) + 1


def loss(run: Run) -> "Figure | None":
    """Training and validation loss: the whole run, and its second half on its own scale."""
    curves = [run.metrics[key] for key in ("loss", "val_loss") if key in run.metrics]
    if not curves:
        return None
    figure = style.figure(4.0)
    if max(len(curve) for curve in curves) < _ENOUGH_TO_ZOOM:
        whole = figure.subplots()
    else:
        whole, end = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_loss(end, run)
        _zoom(end, run)
        end.set_title("Second half, on its own scale")
    _draw_loss(whole, run)
    whole.set_title("Loss")
    whole.set_ylabel("cross-entropy (nats per token)")
    style.legend_above(figure, *whole.get_legend_handles_labels())
    return figure


def _draw_loss(axes: "Axes", run: Run) -> None:
    train, validation = run.metrics.get("loss"), run.metrics.get("val_loss")
    if train is not None:
        width = smoothing_width(len(train))
        axes.plot(
            train.step,
            train.value,
            color=style.BLUE,
            alpha=0.3 if width > 1 else 1.0,
            linewidth=1.0 if width > 1 else 1.6,
            marker="o" if len(train) == 1 else "",
            label="training, each logged step",
        )
        if width > 1:
            smooth = style.moving_mean(train.value, width)
            label = f"training, mean of {width} logged steps"
            axes.plot(train.step, smooth, color=style.BLUE, label=label)
    if validation is not None:
        axes.plot(
            validation.step,
            validation.value,
            color=style.RED,
            marker="o",
            markersize=4.5,
            linewidth=1.2,
            label=f"validation, last {validation.last:.3f}",
        )
    style.step_axis(axes, _steps([curve for curve in (train, validation) if curve is not None]))


def _zoom(axes: "Axes", run: Run) -> None:
    """Show the second half of the steps, and scale the loss to what lies in it."""
    train, validation = run.metrics.get("loss"), run.metrics.get("val_loss")
    steps = _steps([curve for curve in (train, validation) if curve is not None])
    middle = max(int(steps[0]), int(steps[-1]) // 2)
    style.step_axis(axes, np.array([middle, steps[-1]]), most_labels=4)
    bottom, top = [], []
    if train is not None:
        # A single spike is less interesting than the slope: the smooth line sets the top.
        smooth = style.moving_mean(train.value, smoothing_width(len(train)))
        bottom.append(train.value[train.step >= middle])
        top.append(smooth[train.step >= middle])
    if validation is not None:
        bottom.append(validation.value[validation.step >= middle])
        top.append(bottom[-1])
    # A diverged run has losses without bounds: an axis needs two.
    low = _finite(bottom).min(initial=np.inf)
    high = _finite(top).max(initial=-np.inf)
    if low < high:
        margin = 0.08 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _finite(parts: list[Floats]) -> Floats:
    value = np.concatenate(parts)
    return value[np.isfinite(value)]


def _steps(curves: list[Series]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    return np.unique(np.concatenate([curve.step for curve in curves]))


def optimizer(run: Run) -> "Figure | None":
    """Learning rate, and the gradient's norm before clipping."""
    panels = [
        ("lr", "Learning rate", "learning rate", "{x:g}"),
        ("grad_norm", "Gradient norm", "L2 norm, before clipping", "{x:g}"),
    ]
    return _side_by_side(run, panels)


def throughput(run: Run) -> "Figure | None":
    """Tokens per second and peak memory."""
    panels = [
        ("tokens_per_second", "Training speed", "tokens / s", "{x:,.0f}"),
        ("memory_mib", "Memory", "MiB", "{x:,.0f}"),
    ]
    return _side_by_side(run, panels)


def _side_by_side(run: Run, panels: list[tuple[str, str, str, str]]) -> "Figure | None":
    """One panel, from zero up, for each ``(metric, title, unit, number format)`` in the log."""
    present = [panel for panel in panels if panel[0] in run.metrics]
    if not present:
        return None
    ticker = require("matplotlib.ticker", extra="report")
    figure = style.figure(3.0)
    row = figure.subplots(1, len(present), squeeze=False)[0]
    for axes, (key, title, unit, number) in zip(row, present, strict=True):
        series = run.metrics[key]
        marker = "o" if len(series) == 1 else ""
        axes.plot(series.step, series.value, color=style.BLUE, marker=marker)
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter(number))
        known = series.value[np.isfinite(series.value)]
        axes.set_ylim(0.0, 1.08 * known.max(initial=0.0) or 1.0)
        style.step_axis(axes, series.step)
    return figure
