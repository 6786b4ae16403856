"""What a run does not measure stays as it was, with the stamp of its own run."""

import json
from types import SimpleNamespace

import pytest
import torch

STAMP = {
    "command": "python old.py",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123",
    "hardware": {"cpu": "a processor", "threads": 3, "gpus": []},
    "versions": {"torch": "2.11.0"},
}


def kept_parts(result):
    earlier = result.get("earlier", [])
    return {part: stamp["command"] for stamp in earlier for part in stamp["of"]}


def test_tuning_one_product_again(script, tmp_path):
    tune, record = script("tune_fused"), script("record")
    old, shipped = record.load("tune_fused"), tmp_path / "shipped.json"
    before = json.loads(tune.SHIPPED.read_text(encoding="utf-8"))
    shipped.write_text(tune.SHIPPED.read_text(encoding="utf-8"), encoding="utf-8")
    name = "olmoe-1b-7b"
    fast = {"grouped_mm": 0.1}
    tune.keep(old, {name: {"down": fast}}, before["device"], tmp_path, shipped)
    after = json.loads(shipped.read_text(encoding="utf-8"))
    expected = before["plans"] | {"2048x1024": before["plans"]["2048x1024"] | {"down": None}}
    assert after == {"device": before["device"], "plans": expected}
    result = record.load("tune_fused", tmp_path)
    assert result["median_ms"].keys() == old["median_ms"].keys()
    assert result["median_ms"][name] == old["median_ms"][name] | {"down": fast}
    parts, before = kept_parts(result), kept_parts(old)
    assert f"{name}: down" not in parts
    assert {f"{name}: up", "mixtral-8x7b: down"} <= parts.keys()
    assert all(command == before.get(part, old["command"]) for part, command in parts.items())


def test_tuning_a_new_device_from_nothing(script, tmp_path):
    tune = script("tune_fused")
    shipped = tmp_path / "shipped.json"
    tune.keep({}, {"olmoe-1b-7b": {"up": {}, "down": {"turns-s6-g8": 1.0}}}, "X", tmp_path, shipped)
    plans = json.loads(shipped.read_text(encoding="utf-8"))["plans"]
    assert plans == {"2048x1024": {"down": {"turns": {"group": 8}}}}


def test_the_two_gradients_that_may_share_a_copy(script):
    tune = script("tune_fused")
    gathering, turns = (tune.describe(tile) for tile in tune.CANDIDATES["dhidden"][:2])
    alone = tune.describe(tune.CANDIDATES["dweight"][1])
    times = {
        "dhidden": {gathering: 3.0, turns: 2.0},
        "ddown": {alone: 2.6},
        "ddown, copied": {"grouped_mm": 2.5},
    }
    assert "turns" in tune.best(times)["dhidden"]
    assert tune.best(times)["ddown"] is None
    times["ddown, copied"]["grouped_mm"] = 2.7
    assert "turns" in tune.best(times)["dhidden"]
    assert tune.best(times)["ddown"]["stages"] == 5
    times["dhidden"][gathering] = 1.9
    chosen = tune.best(times)
    assert "turns" not in chosen["dhidden"]
    assert chosen["ddown"]["stages"] == 5
    assert tune.best({}) == {}


def test_the_shipped_table_is_what_the_times_say(script):
    tune, record = script("tune_fused"), script("record")
    plans = json.loads(tune.SHIPPED.read_text(encoding="utf-8"))["plans"]
    for name, times in record.load("tune_fused")["median_ms"].items():
        assert plans[f"{tune.SHAPES[name].D}x{tune.SHAPES[name].F}"] == tune.best(times)


def test_equivalence_piece_by_piece(script, tmp_path):
    module, record = script("equivalence"), script("record")
    first, second = module.LAYOUTS[:2]
    setting, other = list(module.SETTINGS)[:2]
    title = next(iter(module.TYPES))
    row = dict.fromkeys(module.COLUMNS, 1e-12)
    old = STAMP | {
        "layouts": {
            second.name: {"world": second.world, "errors": {other: row, "gone": row}},
            "gone": {"world": 2, "errors": {other: row}},
        },
        "types": {title: {first.name: {other: row}}},
    }
    table = module.Table(old, tmp_path)
    new = dict.fromkeys(module.COLUMNS, 2e-12)
    table.put(first, {setting: new})
    result = record.load("equivalence", tmp_path)
    assert {name: set(row["errors"]) for name, row in result["layouts"].items()} == {
        first.name: {setting},
        second.name: {other},
    }
    assert kept_parts(result).keys() == {
        f"{other}: {second.name}",
        f"{other}: {first.name} in {title}",
    }
    table.put(second, {other: new})
    table.put(first, {other: new}, title)
    result = record.load("equivalence", tmp_path)
    assert result["layouts"][second.name]["errors"] == {other: new}
    assert "earlier" not in result
    assert "2e-12" in module.render(result)


def test_sections_of_several_gpus(script, tmp_path):
    multi, record = script("multi_gpu"), script("record")
    world = SimpleNamespace(size=2, device=torch.device("cpu"))
    old = STAMP | {"devices": 2, "device": "cpu", "layer": {"old": 1}, "training": {"old": 1}}
    assert not multi._of_other_devices({}, world)
    assert not multi._of_other_devices(old, world)
    assert multi._of_other_devices(old | {"devices": 4}, world)
    multi._keep(tmp_path, world, old, {"layer": {"new": 1}})
    result = record.load("multi_gpu", tmp_path)
    assert (result["layer"], result["training"]) == ({"new": 1}, {"old": 1})
    assert kept_parts(result) == {"training": "python old.py"}


def test_runs_of_routers_of_the_same_length(script):
    routers = script("routers")
    run = SimpleNamespace(train=SimpleNamespace(steps=5, batch=2), data=SimpleNamespace(seq_len=8))
    rows = [{"router": "gshard", "seed": 1}, {"router": "gone", "seed": 0}]
    old = {"steps": 5, "tokens_per_step": 16, "runs": rows}
    assert routers.earlier_rows(run, old) == rows[:1]
    assert routers.part(rows[0]) == "gshard: seed 1"
    assert routers.earlier_rows(run, old | {"steps": 6}) == []
    assert routers.earlier_rows(run, {}) == []


@pytest.mark.parametrize(
    ("status", "stderr", "said"),
    [
        (1, "Traceback\nValueError: no\n", "ValueError: no"),
        (1, "", "ended with status 1"),
        (-9, "", "killed by signal 9, Killed"),
        (-9, "a warning\n", "killed by signal 9, Killed"),
    ],
)
def test_why_a_child_ended(script, status, stderr, said):
    assert script("openmoe_load")._error(status, stderr) == said
