import json

import pytest
import torch

from expertmesh.metrics import RoutingSummary
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.train.progress import (
    Clock,
    forget_routing,
    layer_entries,
    memory_mib,
    overall,
    routing_state,
    routing_summaries,
    set_routing_state,
)
from tests.train.tiny import MODEL


def summary(load: list[int], dropped: float, imbalance: float) -> RoutingSummary:
    return RoutingSummary(
        load=load,
        relative_load=[],
        imbalance=imbalance,
        cv=0.0,
        dead=0,
        entropy=0.5,
        max_logit=2.0,
        dropped=dropped,
        dropped_by_position=[0.0] * 16,
    )


def test_overall_takes_the_worst_layer_and_weighs_drops_by_choices() -> None:
    layers = {"a": summary([30, 10], 0.1, 1.5), "b": summary([5, 5], 0.6, 1.0)}
    assert overall(layers) == {"imbalance": 1.5, "dropped": pytest.approx(0.2)}
    assert overall({}) == {}


def test_entries_are_those_of_routing_jsonl() -> None:
    entry = layer_entries({"a": summary([3, 1], 0.1, 1.5)})["a"]
    assert entry == {
        "load": [3, 1],
        "dropped": 0.1,
        "dropped_by_position": [0.0] * 16,
        "entropy": 0.5,
        "max_logit": 2.0,
    }


def test_counters_are_read_once_or_forgotten() -> None:
    model = DecoderLM(DecoderConfig(**MODEL))
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    model(tokens)
    (layer,) = routing_summaries(model).values()
    assert sum(layer.load) == 16
    model(tokens)
    forget_routing(model)
    assert sum(next(iter(routing_summaries(model).values())).load) == 0


def test_counters_go_on_where_they_were_written_down() -> None:
    def forward(start: int) -> None:
        model(torch.arange(start, start + 8).view(2, 4))

    cpu = torch.device("cpu")
    model = DecoderLM(DecoderConfig(**MODEL), seed=0)
    forward(0)
    forward(8)
    expected = routing_summaries(model)
    forward(0)
    state = json.loads(json.dumps(routing_state(model, cpu)))
    forward(8)
    assert routing_summaries(model) == expected
    # As in another process, where nothing was counted yet.
    model = DecoderLM(DecoderConfig(**MODEL), seed=0)
    set_routing_state(model, state, cpu)
    forward(8)
    assert routing_summaries(model) == expected
    set_routing_state(model, {}, cpu)
    assert sum(next(iter(routing_summaries(model).values())).load) == 0


def test_clock_measures_steps_only_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("expertmesh.train.progress.time.perf_counter", lambda: now[0])
    clock = Clock(seconds=10.0, tokens=100)
    now[0] = 5.0
    clock.start()
    now[0] = 7.0
    clock.stop(50)
    now[0] = 9.0
    assert (clock.seconds, clock.tokens) == (12.0, 150)
    assert clock.tokens_per_second() == 25.0
    assert clock.tokens_per_second() == 0.0


def test_memory_is_this_process() -> None:
    assert 50 < memory_mib(torch.device("cpu")) < 100_000
