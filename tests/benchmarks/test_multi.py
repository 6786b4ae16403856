"""The benchmark of several GPUs: what it lays out, what it calls a failure, what it says of one."""

import weakref

import pytest
import torch

from expertmesh.parallel.grid import Grid


@pytest.mark.parametrize("world", [2, 4, 8])
def test_layouts_fit_their_ranks_and_the_model(script, world):
    equivalence = script("multi.equivalence")
    found = equivalence.layouts(world)
    assert len({str(layout) for layout in found}) == len(found)
    for layout in found:
        Grid.infer(world, **layout.axes)
        num_stages = layout.axes.get("pp", 1) * layout.per_rank
        assert num_stages <= equivalence.MODEL["num_layers"]
        assert equivalence.MODEL["num_heads"] % layout.axes.get("tp", 1) == 0
    for axis in ("dp", "cp", "tp", "ep", "etp", "pp"):
        assert any(layout.axes.get(axis, 1) > 1 for layout in found)


def test_an_error_is_one_line(script):
    words = script("multi.world")._in_words
    assert words(torch.OutOfMemoryError("CUDA out of memory.")) == "out of memory"
    assert words(RuntimeError("rank 1: OutOfMemoryError: CUDA")) == "out of memory"
    assert words(ValueError("no\n  such | thing")) == "failed: ValueError: no such / thing"


def test_a_case_that_failed_leaves_nothing(script):
    world = script("multi.world").World(torch.device("cpu"), tiny=True)
    seen = []

    def case():
        model = torch.nn.Linear(2, 2)
        model.itself = [model]  # a cycle, as sharded modules are
        seen.append(weakref.ref(model))

        def step():
            raise RuntimeError(f"no step of {model}")

        world.seconds(step, 1, 1)

    assert world.attempt(case).startswith("failed: RuntimeError: no step of Linear(")
    assert seen[0]() is None
    assert world.attempt(lambda: world.together(lambda: 3)) == 3


def training_result(speeds, scaling):
    return {
        "model": "a model",
        "tokens per device": 8,
        "tokens per second per device": speeds,
        "weak scaling": scaling,
        "peak GiB": {},
    }


def test_what_others_cannot_do_is_no_failure(script):
    training = script("multi.training")
    others = dict.fromkeys(training.OTHERS, "out of memory")
    good = training_result({"1 device": 2.0, "dp": 1.9, **others}, {"dp": 0.95})
    assert training.failures(good) == []
    assert sum("out of memory" in line for line in training.table(good)) == len(others)
    bad = training_result({"1 device": "out of memory", "dp": 1.9}, {})
    assert training.failures(bad) == ["training: 1 device out of memory"]
    slow = training_result({"1 device": 2.0, "dp": 1.0}, {"dp": 0.5, training.RIVAL: 1.0})
    assert len(training.failures(slow)) == 1


def spread_row(blocks, same=True):
    return {
        "blocks": blocks,
        "GB": [1.5, 2.5],
        "seconds load": 1.0,
        "seconds text": 2.0,
        "same text": same,
    }


def test_other_texts_and_empty_devices_are_failures(script):
    spread = script("multi.spread")
    one, both = {"cuda:0": 4}, {"cuda:0": 2, "cuda:1": 2}
    about = {"model": "m", "dtype": "d", "weights": "w", "new tokens": 3, "devices": 2}
    rows = {kind: spread_row(both) for kind in (spread.AUTO, spread.BLOCKS)}
    good = about | {"maps": {spread.ALONE: spread_row(one), **rows}}
    assert spread.failures(good) == []
    assert "| auto | cuda:0 2, cuda:1 2 | 1.5, 2.5 | 1.0 | 2.0 | yes |" in spread.table(good)
    for kind in (spread.AUTO, spread.BLOCKS):
        for row, said in ((spread_row(one), "blocks on cuda:0"), (spread_row(both, False), "text")):
            (found,) = spread.failures(about | {"maps": good["maps"] | {kind: row}})
            assert kind in found
            assert said in found
    assert spread.failures(about | {"maps": "out of memory"}) == ["openmoe: out of memory"]
