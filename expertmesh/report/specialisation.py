"""Whether routers look at more than the token's id, and how early they stop changing."""

from typing import TYPE_CHECKING, Any

from expertmesh.report import balance, style
from expertmesh.report.by_token import ByToken
from expertmesh.report.read import Floats, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def by_token(run: Run) -> "Figure | None":
    """First choices told by the token's id, and ids whose favourite expert is the final one."""
    layers = tuple(layer for layer in run.routing if len(layer.by_token))
    if not layers:
        return None
    figure = style.figure(3.6)
    told, settled = figure.subplots(1, 2, sharey=True)
    colours = style.by_depth(len(layers))
    for layer, colour in zip(layers, colours, strict=True):
        seen = layer.by_token
        _draw(told, seen, seen.guessed, colour, "-")
        _draw(told, seen, seen.unguided, colour, (0, (1, 2)))
        _draw(settled, seen, seen.settled, colour, "-")
    told.set_title("First choices told by the token's id")
    told.set_ylabel("tokens (%)")
    settled.set_title("Ids with their final favourite expert")
    settled.set_ylabel("frequent ids (%)")
    told.set_ylim(0, 102)
    for axes in (told, settled):
        style.step_axis(axes, layers[0].by_token.step)
    balance.layer_legend(figure, layers, colours)
    return figure


def _draw(axes: "Axes", seen: ByToken, share: Floats, colour: Any, dashes: Any) -> None:
    marker = "o" if len(seen) < 20 and dashes == "-" else ""
    axes.plot(seen.step, 100 * share, color=colour, ls=dashes, lw=1.3, marker=marker, ms=3.0)
