"""A run that stops and continues repeats the one that never stopped, or says why it may not."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from expertmesh.errors import UserError
from expertmesh.testing import run_on_ranks
from expertmesh.train.checkpoint import Checkpoint
from expertmesh.train.config import RunFile
from expertmesh.train.loop import Trainer
from expertmesh.train.run_file import load_run_file
from expertmesh.train.step import Stepper
from tests.train.tiny import Silent, fit, losses, make_run, metrics


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """Send this process a signal while it takes a step."""
    original = Stepper.step

    def stepping(self: Stepper, now: int, batch: Any) -> Any:
        if now == step:
            signal.raise_signal(number)
        return original(self, now, batch)

    monkeypatch.setattr(Stepper, "step", stepping)


EVERYTHING = {
    "plain": (),
    "accumulation": ("--train.micro_batch=2",),
    "noise": (
        "--train.micro_batch=2",
        "--model.router=switch",
        "--model.experts_per_token=1",
        "--model.router_options.bias_rate=0.01",
    ),
    "fp16": (
        "--train.precision=fp16",
        "--train.micro_batch=2",
        "--optim.schedule=wsd",
        "--optim.decay_steps=3",
    ),
    "adafactor": (
        "--optim.name=adafactor",
        "--optim.schedule=inverse_sqrt",
        "--train.save_every=0",
        "--loss.label_smoothing=0.1",
        "--loss.z_loss=1e-3",
    ),
    "bf16": ("--train.precision=bf16", "--train.checkpoint_activations=true"),
}


@pytest.mark.parametrize("overrides", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_a_resumed_run_repeats_the_uninterrupted_one_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    whole = make_run(tmp_path, *overrides, f"--run.dir={tmp_path}/whole")
    fit(whole)

    halves = make_run(tmp_path, *overrides, f"--run.dir={tmp_path}/halves")
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGTERM)
        outcome = Trainer(halves).fit(Silent())
    assert (outcome.step, outcome.stopped_by) == (4, "SIGTERM")
    resumed = Trainer(halves)
    assert resumed.step == 4
    assert resumed.fit(Silent()).step == 6

    assert [entry["step"] for entry in metrics(halves)] == [1, 2, 3, 4, 5, 6]
    assert losses(halves) == losses(whole)


def test_a_crash_between_checkpoints_repeats_the_lost_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_run(tmp_path, f"--run.dir={tmp_path}/whole")
    fit(whole)
    run = make_run(tmp_path)

    def crash(self: Stepper, step: int, batch: Any) -> Any:
        if step == 5:
            raise RuntimeError("power cut")
        return original(self, step, batch)

    original = Stepper.step
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(run)
    assert len(metrics(run)) == 4
    trainer = Trainer(run)
    assert trainer.step == 3
    trainer.fit(Silent())
    assert losses(run) == losses(whole)


SPARSE = (
    "--train.steps=12",
    "--train.log_every=5",
    "--train.save_every=3",
    "--eval.every=0",
    "--model.router_options.capacity.factor=0.7",
)


def fit_until(run: RunFile, last: int) -> None:
    """Train, and crash in the step after ``last``."""

    def crash(self: Stepper, step: int, batch: Any) -> Any:
        if step > last:
            raise RuntimeError("power cut")
        return original(self, step, batch)

    original = Stepper.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            fit(run)


def fit_twice(path: Path, *overrides: str) -> None:
    """A run, and one that is cut between two lines and continues between two others."""
    fit(make_run(path, *overrides, f"--run.dir={path}/whole"))
    broken = make_run(path, *overrides, f"--run.dir={path}/broken")
    fit_until(broken, 8)
    fit(broken)


def logged(folder: Path) -> list[dict[str, Any]]:
    """All numbers that a run logged but those of clock and memory, by line."""
    timed = {"seconds", "tokens_per_second", "memory_mib"}
    return [
        {name: value for name, value in json.loads(line).items() if name not in timed}
        for file in ("metrics.jsonl", "routing.jsonl")
        for line in (folder / file).read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("ranks", "overrides"), [(1, ()), (2, ("--mesh.ep=2",)), (2, ("--mesh.pp=2",))], ids=str
)
def test_a_resumed_run_logs_what_was_counted_before_it(
    tmp_path: Path, ranks: int, overrides: tuple[str, ...]
) -> None:
    if ranks == 1:
        fit_twice(tmp_path, *SPARSE)
    else:
        make_run(tmp_path)
        run_on_ranks(ranks, fit_twice, tmp_path, *SPARSE, *overrides, timeout=120)
    whole, broken = logged(tmp_path / "whole"), logged(tmp_path / "broken")
    assert [line["step"] for line in whole] == [1, 5, 10, 12] * 2
    assert whole[2]["dropped"] > 0
    assert broken == whole


def test_counters_go_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """The last line is of steps 11 and 12: two ranks counted the first, one the second."""
    overrides = [o for o in SPARSE if "save_every" not in o] + ["--train.save_every=11"]
    run = make_run(tmp_path, *overrides)
    run_on_ranks(2, fit_until, run, 11, timeout=120)
    fit(run)
    alone = make_run(tmp_path, *overrides, f"--run.dir={tmp_path}/alone")
    fit(alone)
    got, expected = logged(run.folder)[-1], logged(alone.folder)[-1]
    ((name, layer),) = expected["layers"].items()
    assert sum(got["layers"][name]["load"]) == 2 * 4 * 16 * 2
    for key in ("load", "dropped", "dropped_by_position", "entropy", "max_logit"):
        # A rounding may turn a token or two.
        assert got["layers"][name][key] == pytest.approx(layer[key], rel=0.05, abs=0.05)


def test_a_checkpoint_of_an_earlier_version_has_no_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, *SPARSE)
    fit_until(run, 6)
    state = Checkpoint.state

    def without(self: Checkpoint) -> dict[str, Any]:
        return {key: value for key, value in state(self).items() if key != "routing"}

    monkeypatch.setattr(Checkpoint, "state", without)
    fit(run)
    (layer,) = logged(run.folder)[-2]["layers"].values()
    assert sum(layer["load"]) == 4 * 4 * 16 * 2


def test_ctrl_c_saves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    stop_after(monkeypatch, 2, signal.SIGINT)
    outcome = Trainer(run).fit(Silent())
    assert (outcome.step, outcome.stopped_by) == (2, "SIGINT")
    assert [checkpoint.step for checkpoint in Trainer(run).checkpoints.complete()] == [2]


def started_beside_a_run(path: Path) -> str:
    """What a rank is told whose folder is its own, where the first rank's holds a run."""
    run = make_run(path, "--run.resume=none", "--run.dir=run")
    os.chdir(path / os.environ["RANK"])
    with pytest.raises(UserError) as caught:
        Trainer(run)
    return str(caught.value)


def test_resume_none_refuses_on_every_rank_what_the_first_one_sees(tmp_path: Path) -> None:
    (tmp_path / "0" / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "1").mkdir()
    make_run(tmp_path)
    for told in run_on_ranks(2, started_beside_a_run, tmp_path, timeout=30):
        assert "run already holds a run, and run.resume is 'none'" in told


def test_resume_none_refuses_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    fit(make_run(tmp_path))
    with pytest.raises(UserError, match=r'already holds a run.*set run.resume = "auto"'):
        Trainer(make_run(tmp_path, "--run.resume=none"))


def test_the_folders_own_run_file_continues_where_another_may_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--run.resume=none", "--train.steps=3")
    Trainer(run).fit(Silent())
    with pytest.raises(UserError, match="already holds a run"):
        Trainer(run)
    again = load_run_file(run.folder / "config.toml", ["--train.steps=4"])
    trainer = Trainer(again)
    assert trainer.step == 3
    assert trainer.changes() == ["train.steps: 3 -> 4"]


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    fit(make_run(tmp_path))
    longer = Trainer(make_run(tmp_path, "--train.steps=8"))
    assert not longer.done
    assert longer.changes() == ["train.steps: 6 -> 8"]
    assert longer.fit(Silent()).step == 8


def test_the_end_of_earlier_steps_is_not_left_as_this_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--train.steps=2")
    Trainer(run).fit(Silent())
    table = run.folder / "expert_tokens.json"
    table.write_text('{"layers": {}}')
    Trainer(run).fit(Silent())
    assert table.exists()
    Trainer(make_run(tmp_path, "--train.steps=3")).fit(Silent())
    assert not table.exists()


def test_the_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    fit(make_run(tmp_path))
    with pytest.raises(UserError, match=r"saved from another model; .*misshapen: .*up|gate"):
        Trainer(make_run(tmp_path, "--model.num_experts=8"))


def test_a_corrupt_checkpoint_is_named_and_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    fit(run)
    weights = run.folder / "checkpoints" / "step_00000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    trainer = Trainer(run)
    assert trainer.step == 3
    assert f"{weights} is corrupt" in trainer.notes[0]


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    fit(run)
    (record,) = json.loads((run.folder / "data.json").read_text())["sources"]
    assert record["source"] == run.data.source
    moved = Path(run.data.source).rename(tmp_path / "moved.txt")
    assert Trainer(make_run(tmp_path, f"--data.source={moved}", "--train.steps=7")).step == 6
    with moved.open("a") as text:
        text.write("one more line\n")
    changed = (f"--data.source={moved}", "--train.steps=8")
    with pytest.raises(UserError, match=r"begun with other data: .*text.txt.*moved.txt"):
        Trainer(make_run(tmp_path, *changed))
    assert json.loads((run.folder / "data.json").read_text())["sources"] == [record]
    fresh = Trainer(make_run(tmp_path, *changed, f"--run.dir={tmp_path}/fresh"))
    assert fresh.fit(Silent()).step == 8


def continued_on(path: Path) -> str:
    """What a rank is told where only the second one's folder says that the data were others."""
    from expertmesh.train.provenance import check_same_data

    def elsewhere(_: Path, provenance: Any) -> None:
        check_same_data(path / os.environ["RANK"], provenance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expertmesh.train.loop.check_same_data", elsewhere)
        with pytest.raises(UserError) as caught:
            Trainer(make_run(path))
    return str(caught.value)


def test_other_data_on_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    fit(run)
    text = (run.folder / "data.json").read_text()
    for rank, written in enumerate((text, "nothing")):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "data.json").write_text(written)
    one, two = run_on_ranks(2, continued_on, tmp_path, timeout=60)
    assert one == two
    assert one.startswith(f"rank 1: {tmp_path / '1' / 'data.json'} is not readable")


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    fit(make_run(tmp_path, "--train.steps=3"))
    with pytest.raises(UserError, match=r"holds the state of optim.name='adamw', got 'adafactor'"):
        Trainer(make_run(tmp_path, "--optim.name=adafactor"))
