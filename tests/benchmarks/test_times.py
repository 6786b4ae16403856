import gc

import torch


def test_every_step_has_its_turn(script):
    now = iter(range(100))
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = script("turns").take_turns(steps, 3, warm=1, clock=lambda: float(next(now)))
    assert calls == ["a", "b"] * 4
    assert times == {"a": [1e3] * 3, "b": [1e3] * 3}


def test_memory_of_cycles_is_given_back(script):
    seen = []

    class Cycle:
        def __init__(self):
            self.own = self

        def __del__(self):
            seen.append("freed")

    world_type = script("multi.world").World
    world = object.__new__(world_type)  # without processes
    world.device = torch.device("cpu")
    gc.disable()
    try:
        Cycle()
        assert seen == []
        world.free()
    finally:
        gc.enable()
    assert seen == ["freed"]


def test_use_of_a_device(script, monkeypatch):
    peak = script("peak")
    assert peak.utilisation(1.0, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peak.utilisation(989.4e12 / 4, torch.device("cuda")) == 0.25
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "another")
    assert peak.utilisation(1.0, torch.device("cuda")) is None
