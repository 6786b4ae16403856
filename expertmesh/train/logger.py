"""A run's numbers on disk: JSON lines always, TensorBoard when asked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertmesh.errors import require
from expertmesh.train.files import full_disk_named, write_whole

METRICS, ROUTING = "metrics.jsonl", "routing.jsonl"


class JSONLines:
    """One JSON object per line, each written through at once.

    Args:
        path: The file; made if absent.
        after: Lines of later steps are removed first. They are of work that the checkpoint a run
            resumes from does not hold, and will be written again.
    """

    def __init__(self, path: Path, *, after: int) -> None:
        self.path = path
        kept = [line for line in self._lines() if line["step"] <= after]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one object; it must hold ``"step"``.

        Raises:
            OSError: If it cannot be written, naming the file.
        """
        with full_disk_named(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def _lines(self) -> list[dict[str, Any]]:
        """What is there, without lines that a crash cut short or that are no entry."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
        return lines


class RunLogger:
    """Writes ``metrics.jsonl``, ``routing.jsonl`` and, when asked, ``tensorboard/``.

    Args:
        folder: The run's folder.
        after: The step that the run starts from; later lines are removed.
        tensorboard: Also write TensorBoard events.

    Raises:
        MissingDependency: If TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, *, after: int = 0, tensorboard: bool = False) -> None:
        self._events = None
        if tensorboard:
            require("tensorboard", extra="report")
            writer = require("torch.utils.tensorboard", extra="report").SummaryWriter
            self._events = writer(folder / "tensorboard", purge_step=after + 1)
        self._metrics = JSONLines(folder / METRICS, after=after)
        self._routing = JSONLines(folder / ROUTING, after=after)

    def log(self, metrics: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Write one step.

        Args:
            metrics: Numbers by name, ``"step"`` among them.
            layers: For each MoE layer by name: its load and drops.
        """
        self._metrics.write(metrics)
        if layers:
            self._routing.write({"step": metrics["step"], "layers": layers})
        if self._events is not None:
            for name, value in metrics.items():
                if name != "step":
                    self._events.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Finish TensorBoard's file; the JSON lines need nothing."""
        if self._events is not None:
            self._events.close()
