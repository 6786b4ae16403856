"""The numbers of a run that fit on one screen."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from expertmesh.metrics import DEAD_BELOW
from expertmesh.report.read import LayerRouting, Run, Series

if TYPE_CHECKING:
    from expertmesh.models.config import DecoderConfig


@dataclass(frozen=True)
class Fact:
    """A number with its name, and a remark that may be empty."""

    name: str
    value: str
    remark: str = ""


def quantity(value: float) -> str:
    """A count in three digits or so: 950, 12,300, 1.23 M, 46.7 B."""
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share in per cent, with enough digits that a small one does not read as none."""
    if share == 0.0:
        return "0 %"
    return f"{100 * share:.2g} %" if share < 0.01 else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def headline(run: Run) -> list[Fact]:
    """What a reader wants to know first, as far as the run logged it."""
    return [*_progress(run), *_loss(run), *_cost(run), *_balance(run)]


def planned_steps(run: Run) -> int | None:
    """The number of steps that the run was configured for, if its configuration says so."""
    train = run.config.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    return steps if isinstance(steps, int) else None


def _progress(run: Run) -> Iterator[Fact]:
    planned = planned_steps(run)
    unfinished = planned is not None and run.last_step < planned
    yield Fact("steps", f"{run.last_step:,}", f"of {planned:,}: not finished" if unfinished else "")
    tokens, seconds = run.metrics.get("tokens"), run.metrics.get("seconds")
    if tokens:
        known = seconds if seconds and math.isfinite(seconds.last) else None
        remark = f"in {duration(known.last)}" if known else ""
        yield Fact("tokens trained on", quantity(tokens.last), remark)


def _loss(run: Run) -> Iterator[Fact]:
    train, validation = run.metrics.get("loss"), run.metrics.get("val_loss")
    if train:
        yield Fact("training loss", f"{train.last:.4f}", "nats per token, last in the log")
    if validation:
        yield Fact("validation loss", f"{validation.last:.4f}", _validation_remark(validation))
        yield Fact("perplexity", _perplexity(validation.last), "exp of the validation loss")
        yield from _bits_per_byte(run, validation)


def _validation_remark(validation: Series) -> str:
    remark = f"nats per token, step {validation.step[-1]:,}"
    if np.isfinite(validation.value).any():
        best = int(np.nanargmin(validation.value))
        if validation.value[best] < validation.last:
            remark += f"; best {validation.value[best]:.4f} at step {validation.step[best]:,}"
    return remark


def _perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700.0))
    return f"{value:.2f}" if not value >= 1000 else quantity(value)


def _bits_per_byte(run: Run, validation: Series) -> Iterator[Fact]:
    """As logged; else with byte-level tokens, where it is the loss in another unit."""
    logged, data = run.metrics.get("val_bits_per_byte"), run.config.get("data")
    if logged:
        yield Fact("bits per byte", f"{logged.last:.4f}", "validation")
    elif isinstance(data, Mapping) and data.get("tokenizer") == "byte":
        bits = validation.last / math.log(2)
        yield Fact("bits per byte", f"{bits:.4f}", "validation loss / ln 2")


def _cost(run: Run) -> Iterator[Fact]:
    speed, memory = run.metrics.get("tokens_per_second"), run.metrics.get("memory_mib")
    if speed:
        yield Fact("tokens / s", f"{np.nanmedian(speed.value):,.0f}", "median of the log")
    if memory:
        yield Fact("peak memory", f"{np.nanmax(memory.value):,.0f} MiB")
    model = _decoder(run)
    if model is not None:
        active = f"{quantity(model.num_active_params)} active per token"
        remark = active if model.num_active_params < model.num_params else ""
        yield Fact("parameters", quantity(model.num_params), remark)


def _decoder(run: Run) -> "DecoderConfig | None":
    """The model that the run was configured with, unless this version does not know its like."""
    from expertmesh.models.config import DecoderConfig

    table = run.config.get("model")
    try:
        return DecoderConfig(**table) if isinstance(table, dict) else None
    except (TypeError, ValueError):
        return None


def _balance(run: Run) -> Iterator[Fact]:
    if run.routing:
        layer = max(run.routing, key=lambda layer: np.nan_to_num(layer.settled_E.max(), nan=-1.0))
        where = f"at the end: {layer.name}, expert {int(np.argmax(layer.settled_E))}"
        yield Fact("worst load", f"{layer.settled_E.max():.2f} × fair", where)
    logged = run.metrics.get("imbalance")
    if logged and np.isfinite(logged.value).any():
        worst = int(np.nanargmax(logged.value))
        value = f"{logged.value[worst]:.2f} × fair"
        yield Fact("worst load ever", value, f"at step {logged.step[worst]:,}")
    dropped = dropped_share(run)
    if dropped is not None:
        remark = "of all assignments of the run" if dropped else "nothing was dropped"
        yield Fact("dropped", percent(dropped), remark)
    told = [layer for layer in run.routing if len(layer.by_token)]
    if told:
        layer = max(told, key=lambda layer: layer.by_token.guessed[-1])
        unguided = percent(float(layer.by_token.unguided[-1]))
        remark = f"first choices, {layer.name}; {unguided} by one guess for all"
        yield Fact("told by token id", percent(float(layer.by_token.guessed[-1])), remark)


def dropped_share(run: Run) -> float | None:
    """Share of all assignments of the run that were dropped; None where no drops were logged."""
    layers = [layer for layer in run.routing if np.isfinite(layer.dropped).any()]
    if not layers:
        return None
    dropped = sum(float(np.nansum(layer.dropped * layer.load_SE.sum(axis=1))) for layer in layers)
    wanted = sum(float(layer.load_SE[np.isfinite(layer.dropped)].sum()) for layer in layers)
    return dropped / wanted if wanted else 0.0


@dataclass(frozen=True)
class LayerBalance:
    """A layer at the end of the run; loads are over the fair share."""

    name: str
    num_experts: int
    max_over_fair: float
    min_over_fair: float
    cv: float
    num_dead: int
    entropy: float
    dropped: float


def layer_balance(layer: LayerRouting) -> LayerBalance:
    """The numbers behind a row of the heat map, and the means of the same logged steps."""
    ratio_E = layer.settled_E
    return LayerBalance(
        name=layer.name,
        num_experts=layer.num_experts,
        max_over_fair=float(ratio_E.max()),
        min_over_fair=float(ratio_E.min()),
        cv=float(ratio_E.std()),
        num_dead=int((ratio_E < DEAD_BELOW).sum()),
        entropy=float(layer.entropy[-layer.num_settled :].mean()),
        dropped=float(layer.dropped[-layer.num_settled :].mean()),
    )
