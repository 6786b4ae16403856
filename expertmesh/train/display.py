"""What a person sees while a run trains: one line per logged step."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TextIO


def step_line(metrics: Mapping[str, Any], steps: int) -> str:
    """One logged step in words of fixed width.

    Args:
        metrics: An entry of ``metrics.jsonl``.
        steps: Length of the run.
    """
    parts = [
        f"step {metrics['step']:>{len(str(steps))}}/{steps}",
        f"loss {metrics['loss']:.4f}",
        f"val {metrics['val_loss']:.4f}" if "val_loss" in metrics else " " * 10,
        f"lr {metrics['lr']:.2e}",
        f"grad {metrics['grad_norm']:.3f}" if "grad_norm" in metrics else "skipped   ",
        f"{metrics['tokens_per_second']:,.0f} tok/s",
        f"{metrics['memory_mib']:,.0f} MiB",
    ]
    if "imbalance" in metrics:
        parts.append(f"load {metrics['imbalance']:.2f}x")
        parts.append(f"drops {metrics['dropped']:.1%}")
    return "  ".join(parts)


class Display(ABC):
    """Where progress is shown. Use as a context, so that a terminal is left as it was."""

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def message(self, text: str) -> None:
        """Print a line that is not about one step."""

    @abstractmethod
    def advance(self, step: int, loss: float) -> None:
        """Optimizer step ``step`` is done."""

    @abstractmethod
    def log(self, metrics: Mapping[str, Any]) -> None:
        """Print the line of a logged step."""

    def close(self) -> None:
        """Leave the terminal as it was."""
        return


class PlainDisplay(Display):
    """Lines only, flushed one by one: for pipes, files and batch systems.

    Args:
        steps: Length of the run.
        stream: Where to print; standard output by default.
    """

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        self._steps = steps
        self._stream = stream

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def advance(self, step: int, loss: float) -> None:
        return

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.message(step_line(metrics, self._steps))


class TerminalDisplay(Display):
    """The same lines above a live progress bar with the time left.

    Args:
        steps: Length of the run.
        start: Steps done before, by the run that this one continues.
    """

    def __init__(self, steps: int, start: int = 0) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._steps = steps
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
        )
        self._task = self._progress.add_task("training", total=steps, completed=start, loss="-")
        self._progress.start()

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def advance(self, step: int, loss: float) -> None:
        self._progress.update(self._task, completed=step, loss=f"{loss:.3f}")

    def log(self, metrics: Mapping[str, Any]) -> None:
        self.message(step_line(metrics, self._steps))

    def close(self) -> None:
        self._progress.stop()


class NoDisplay(Display):
    """For ranks that do not speak."""

    def message(self, text: str) -> None:
        return

    def advance(self, step: int, loss: float) -> None:
        return

    def log(self, metrics: Mapping[str, Any]) -> None:
        return


def make_display(steps: int, start: int = 0) -> Display:
    """A live bar on a terminal, plain lines anywhere else."""
    # None where the program was started with its output closed.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return TerminalDisplay(steps, start) if terminal else PlainDisplay(steps)
