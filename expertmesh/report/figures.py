"""The pictures of a report: what each shows, in what order, and how to read it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.report import balance, curves, specialisation, style
from expertmesh.report.read import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Subject:
    """A figure that a report may have.

    Attributes:
        name: Its file's name, without ``.png``.
        title: Its heading.
        caption: One sentence that says how to read it.
        draw: Draws it, or returns None where the run has nothing for it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Run], "Figure | None"]


@dataclass(frozen=True)
class Picture:
    """A drawn figure."""

    subject: Subject
    png: bytes


SUBJECTS = (
    Subject(
        "loss",
        "Loss",
        "Lower is better; a validation loss that rises while the training loss falls means that "
        "the model has begun to memorise.",
        curves.loss,
    ),
    Subject(
        "optimizer",
        "Learning rate and gradient norm",
        "The norm should settle after the warm-up; spikes that the loss follows mean that the "
        "learning rate is too high.",
        curves.optimizer,
    ),
    Subject(
        "throughput",
        "Throughput and memory",
        "Speed should be flat after the first steps; memory that keeps growing is a leak.",
        curves.throughput,
    ),
    Subject(
        "load",
        "Load of each expert",
        "Each cell is the share of a layer's assignments that an expert was asked to take, divided "
        "by the fair share: white (1.0) is fair, red is overloaded, blue is little used.",
        balance.load,
    ),
    Subject(
        "load_over_time",
        "Load over time",
        "The band runs from the least to the most loaded expert of a layer: it should close "
        "around 1, and a line that stays at 0 is an expert that learns nothing.",
        balance.load_over_time,
    ),
    Subject(
        "drops",
        "Dropped assignments",
        "Assignments beyond an expert's capacity are dropped; where capacity is filled in order, "
        "late positions lose more than early ones.",
        balance.drops,
    ),
    Subject(
        "entropy",
        "Router confidence",
        "Entropy at the dashed line means that the router does not choose, entropy near zero that "
        "it puts everything on one expert; logits that grow without end make it brittle.",
        balance.entropy,
    ),
    Subject(
        "by_token",
        "Routing by token id",
        "Left, solid near 100 % and far above dotted (one guess for all tokens) means that routers "
        "follow the id and not the context; right, a line that is high from the start means that "
        "routing was fixed early.",
        specialisation.by_token,
    ),
)


def draw(run: Run) -> list[Picture]:
    """Every figure that the run has data for, in the page's order.

    Raises:
        MissingDependency: If matplotlib is not installed.
    """
    pictures = []
    with style.applied():
        for subject in SUBJECTS:
            figure = subject.draw(run)
            if figure is not None:
                pictures.append(Picture(subject, style.png(figure)))
    return pictures
