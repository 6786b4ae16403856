"""Reads a run's folder, also while the run is still writing to it."""

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.errors import UserError
from expertmesh.report.by_token import ByToken, by_token

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One number over the steps at which it was logged.

    Attributes:
        step: int64, ``(S,)``, increasing.
        value: float64, ``(S,)``; may hold NaN where the run logged one.
    """

    step: NDArray[np.int64]
    value: Floats

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last(self) -> float:
        return float(self.value[-1])


@dataclass(frozen=True)
class LayerRouting:
    """What the router of one layer did: one record for the steps since the one before.

    Attributes:
        name: The layer's name in the model, for example ``blocks.1.moe``.
        step: int64, ``(S,)``.
        load_SE: Assignments that each expert was asked to take, overflowed ones included.
        dropped: Share of assignments that were dropped, ``(S,)``; NaN where not logged.
        dropped_by_position: The same share in equal bins over the relative position in the
            sequence, ``(S, bins)``; ``bins`` is 0 where it was not logged.
        entropy: Of the router, in nats, ``(S,)``; NaN where not logged.
        max_logit: Largest absolute router logit, ``(S,)``; NaN where not logged.
        by_token: What evaluations found of the tokens' ids; of no length where none was logged.
    """

    name: str
    step: NDArray[np.int64]
    load_SE: Floats
    dropped: Floats
    dropped_by_position: Floats
    entropy: Floats
    max_logit: Floats
    by_token: ByToken

    @property
    def num_experts(self) -> int:
        return self.load_SE.shape[1]

    @property
    def ratio_SE(self) -> Floats:
        """Load / fair share of each record; NaN where it had no token at all."""
        return _over_fair_share(self.load_SE)

    @property
    def num_settled(self) -> int:
        """How many records stand for the end of the run: the last tenth, at least five."""
        num_steps = len(self.step)
        return min(num_steps, max(5, math.ceil(num_steps / 10)))

    @property
    def settled_steps(self) -> str:
        """The steps that those records cover, in words."""
        earlier = self.step[: -self.num_settled]
        first = int(earlier[-1]) + 1 if len(earlier) else 1
        return f"steps {first:,} to {int(self.step[-1]):,}"

    @property
    def settled_E(self) -> Floats:
        """Load / fair share, summed over the end of the run."""
        return _over_fair_share(self.load_SE[-self.num_settled :].sum(axis=0))


@dataclass(frozen=True)
class TokenCount:
    """A token that an expert takes often.

    Attributes:
        text: The token, as the tokenizer spells it.
        count: How often the expert took it.
        lift: Its share among this expert's tokens / its share among all tokens.
    """

    text: str
    count: int
    lift: float


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        path: The folder.
        metrics: One series for each key of ``metrics.jsonl`` but ``step``.
        routing: The MoE layers in the model's order; empty for a dense model.
        expert_tokens: Layer name to, for each expert, the tokens it takes most; may be empty.
        config: The resolved configuration; empty if there is none.
        config_text: The same, as written.
        samples: Generated text, or an empty string.
        notes: What could not be read, one sentence each.
    """

    path: Path
    metrics: dict[str, Series]
    routing: tuple[LayerRouting, ...]
    expert_tokens: dict[str, tuple[tuple[TokenCount, ...], ...]]
    config: dict[str, Any]
    config_text: str
    samples: str
    notes: tuple[str, ...]

    @property
    def last_step(self) -> int:
        return max(int(series.step[-1]) for series in self.metrics.values())


def read_run(path: str | Path) -> Run:
    """Read a run's folder.

    Args:
        path: The folder that ``expertmesh train`` wrote. The run may still be going.

    Raises:
        UserError: If the folder or its ``metrics.jsonl`` is missing, or no line of it is readable.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"run must be a folder written by `expertmesh train`, and {str(path)!r} "
            f"{'is a file' if path.exists() else 'does not exist'}; "
            "give the folder that the run file names as run.dir"
        )
    notes: list[str] = []
    metrics = _series(_records(path / "metrics.jsonl", notes))
    if not metrics:
        raise UserError(
            f"{str(path)!r} has no metrics.jsonl with a logged step in it, so there is nothing to "
            "draw; run `expertmesh train` with this run.dir up to its first logged step"
        )
    config_text = _text(path / "config.toml")
    return Run(
        path=path,
        metrics=metrics,
        routing=_layers(_records(path / "routing.jsonl", notes)),
        expert_tokens=_expert_tokens(path / "expert_tokens.json", notes),
        config=_config(config_text, notes),
        config_text=config_text,
        samples=_text(path / "samples.txt"),
        notes=tuple(notes),
    )


def _over_fair_share(load: Floats) -> Floats:
    total = load.sum(axis=-1, keepdims=True)
    return load * load.shape[-1] / np.where(total > 0, total, np.nan)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a log, by increasing step, without what a resumed run wrote anew.

    A step that is not after the one before it means that the run went back to a checkpoint: what
    the abandoned stretch logged from there on is left out. A repeat of the last step adds to it.
    """
    records: list[dict[str, Any]] = []
    lines = [line for line in _text(path).split("\n") if line.strip()]
    unreadable = 0
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            # The last line may be half-written because the run is writing it right now.
            unreadable += number < len(lines)
        elif records and records[-1]["step"] == record["step"]:
            records[-1] = records[-1] | record
        else:
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
            records.append(record)
    if unreadable:
        notes.append(f"{unreadable} of {len(lines)} lines of {path.name} are not readable")
    return records


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_int=_int64)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    return record if _are_layers(record.get("layers") or {}) else None


def _int64(digits: str) -> int:
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits} is no step and no count")
    return value


def _are_layers(layers: object) -> bool:
    """Whether a line's layers have their numbers by expert and by position where they belong."""
    if not isinstance(layers, dict) or not all(isinstance(x, dict) for x in layers.values()):
        return False
    lists = [layer.get(key) for layer in layers.values() for key in ("load", "dropped_by_position")]
    return all(
        isinstance(values, list) and all(isinstance(value, int | float) for value in values)
        for values in lists
        if values is not None
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _series(records: list[dict[str, Any]]) -> dict[str, Series]:
    """One series for each key that ever held a number; null counts as not logged."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                points.setdefault(key, []).append((record["step"], float(value)))
    return {
        key: Series(
            np.array([step for step, _ in pairs], dtype=np.int64),
            np.array([value for _, value in pairs], dtype=np.float64),
        )
        for key, pairs in points.items()
    }


def _layers(records: list[dict[str, Any]]) -> tuple[LayerRouting, ...]:
    """The layers of the newest record, each with the records that have its number of experts."""
    if not records:
        return ()
    names = [name for name, layer in _of(records[-1]).items() if layer.get("load")]
    return tuple(_layer(name, records) for name in names)


def _of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    layers = record.get("layers")
    return layers if isinstance(layers, dict) else {}


def _layer(name: str, records: list[dict[str, Any]]) -> LayerRouting:
    newest = _of(records[-1])[name]
    num_experts, num_bins = len(newest["load"]), len(newest.get("dropped_by_position") or ())
    seen = [(record["step"], _of(record).get(name) or {}) for record in records]
    seen = [(step, layer) for step, layer in seen if len(layer.get("load") or ()) == num_experts]

    def column(key: str) -> Floats:
        return np.array([_number(layer.get(key)) for _, layer in seen], dtype=np.float64)

    def bins(layer: dict[str, Any]) -> list[float]:
        values = [_number(value) for value in layer.get("dropped_by_position") or ()]
        return values if len(values) == num_bins else [math.nan] * num_bins

    return LayerRouting(
        name=name,
        step=np.array([step for step, _ in seen], dtype=np.int64),
        load_SE=np.array([layer["load"] for _, layer in seen], dtype=np.float64),
        dropped=column("dropped"),
        dropped_by_position=np.array([bins(layer) for _, layer in seen], dtype=np.float64),
        entropy=column("entropy"),
        max_logit=column("max_logit"),
        by_token=by_token(seen),
    )


def _expert_tokens(path: Path, notes: list[str]) -> dict[str, tuple[tuple[TokenCount, ...], ...]]:
    if not path.is_file():
        return {}
    try:
        layers = json.loads(_text(path))["layers"]
        return {
            name: tuple(
                tuple(TokenCount(str(text), int(n), float(lift)) for text, n, lift in expert)
                for expert in layer["experts"]
            )
            for name, layer in layers.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        notes.append(f"{path.name} is not readable, so there is no table of tokens")
        return {}


def _config(text: str, notes: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        notes.append(f"config.toml is not valid TOML ({error})")
        return {}
