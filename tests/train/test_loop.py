import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.testing import run_on_ranks
from expertmesh.train.checkpoint import Checkpoint
from expertmesh.train.config import RunFile
from expertmesh.train.loop import Trainer
from expertmesh.train.passes import OneByOne
from expertmesh.train.run_file import load_run_file, parse_run
from expertmesh.train.step import Stepper
from tests.train.tiny import Silent, make_run, tables


def fit(run: RunFile) -> Silent:
    display = Silent()
    Trainer(run).fit(display)
    return display


def metrics(run: RunFile) -> list[dict[str, Any]]:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run: RunFile) -> list[tuple[float, float | None]]:
    return [(entry["loss"], entry.get("val_loss")) for entry in metrics(run)]


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


def test_the_run_learns_and_writes_what_it_promises(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--train.steps=30", "--eval.every=10", "--train.log_every=5")
    display = fit(run)
    assert display.losses[-1] < display.losses[0] - 1.0
    entries = metrics(run)
    assert display.entries == entries
    assert [entry["step"] for entry in entries] == [1, 5, 10, 15, 20, 25, 30]
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [10, 20, 30]
    for entry in entries:
        # Bytes and the mark behind a document differ by one target in hundreds.
        bits = entry["val_loss"] / math.log(2) if "val_loss" in entry else None
        assert entry.get("val_bits_per_byte") == (bits and pytest.approx(bits, rel=0.02))
    last = entries[-1]
    assert last["tokens"] == 30 * 4 * 16
    assert last["lr"] == pytest.approx(3e-4)
    assert last["dropped"] == 0.0
    assert last["imbalance"] >= 1.0
    assert {"grad_norm", "tokens_per_second", "memory_mib", "seconds"} <= last.keys()
    routing = [json.loads(line) for line in (run.folder / "routing.jsonl").read_text().splitlines()]
    (layer,) = routing[-1]["layers"].values()
    # Five steps since the line before; the evaluation at step 30 is not in it.
    assert sum(layer["load"]) == 5 * 4 * 16 * 2
    assert len(layer["dropped_by_position"]) == 16
    assert (run.folder / "config.toml").exists()
    assert sorted(p.name for p in (run.folder / "checkpoints").iterdir()) == [
        "step_00000027",
        "step_00000030",
    ]


def test_micro_batches_and_recompute_change_nothing_but_rounding(tmp_path: Path) -> None:
    without_balance = "--model.router_options.balance_coef=0"
    plain = make_run(tmp_path, without_balance, f"--run.dir={tmp_path}/plain")
    other = make_run(
        tmp_path,
        without_balance,
        "--train.micro_batch=1",
        "--train.checkpoint_activations=true",
        f"--run.dir={tmp_path}/other",
    )
    torch.testing.assert_close(fit(plain).losses, fit(other).losses, rtol=1e-4, atol=0)
    assert metrics(plain)[-1]["tokens"] == metrics(other)[-1]["tokens"]


def test_padded_documents_count_targets_only(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--data.pack=false", "--train.micro_batch=2")
    fit(run)
    assert metrics(run)[-1]["tokens"] <= 6 * 4 * 16


def test_a_loss_that_is_not_finite_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "--train.save_every=2")

    def poisoned(self: OneByOne, batch: Any, *, step: int, **others: Any) -> torch.Tensor:
        return original(self, batch, step=step, **others) * (float("nan") if step == 4 else 1)

    original = OneByOne.backward
    monkeypatch.setattr(OneByOne, "backward", poisoned)
    with pytest.raises(UserError, match="the loss is nan at step 4"):
        fit(run)
    folder = Trainer(run).checkpoints
    assert [checkpoint.step for checkpoint in folder.complete()] == [2]
    assert folder.newest_valid()[0] is not None


def test_weights_that_are_not_finite_never_become_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, "--train.save_every=1", "--eval.every=0")

    def breaking(self: Stepper, step: int, batch: Any) -> Any:
        result = original(self, step, batch)
        if step == 4:
            next(self.model.parameters()).data.view(-1)[0] = float("nan")
        return result

    original = Stepper.step
    monkeypatch.setattr(Stepper, "step", breaking)
    with pytest.raises(UserError, match=r"embedding.weight is not finite after step 4; nothing"):
        fit(run)
    assert [checkpoint.step for checkpoint in Trainer(run).checkpoints.complete()] == [2, 3]


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


def test_a_vocabulary_or_sequence_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at least 258.*got 100; set model.vocab_size = 258"):
        Trainer(make_run(tmp_path, "--model.vocab_size=100"))
    with pytest.raises(UserError, match=r"data.seq_len must be at most model.max_seq_len=8"):
        Trainer(make_run(tmp_path, "--model.max_seq_len=8"))


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.txt"):
        Trainer(make_run(tmp_path, f"--data.source={tmp_path}/nowhere.txt"))


def test_the_order_of_samples_depends_on_seed_and_step_only(tmp_path: Path) -> None:
    batches = [
        Trainer(make_run(tmp_path, *overrides)).loader.batch(3).sample_index_B.tolist()
        for overrides in ((), ("--train.micro_batch=1",), ("--run.seed=8",))
    ]
    assert batches[0] == batches[1]
    assert batches[0] != batches[2]


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tmp_path: Path) -> None:
    eager = make_run(tmp_path, f"--run.dir={tmp_path}/eager")
    compiled = make_run(tmp_path, "--train.compile=true", f"--run.dir={tmp_path}/compiled")
    torch.testing.assert_close(fit(eager).losses, fit(compiled).losses, rtol=1e-3, atol=0)
    assert metrics(compiled)[-1]["imbalance"] == pytest.approx(
        metrics(eager)[-1]["imbalance"], rel=0.05
    )


def test_epochs_become_steps_by_the_size_of_the_data(tmp_path: Path) -> None:
    content = tables(tmp_path)
    del content["train"]["steps"]
    content["train"] |= {"epochs": 0.25, "log_every": 100}
    trainer = Trainer(parse_run(content))
    steps = math.ceil(0.25 * len(trainer.data.train) / 4)
    assert trainer.run.train.steps == steps
    assert trainer.fit(Silent()).step == steps
    saved = load_run_file(trainer.run.folder / "config.toml")
    assert (saved.train.steps, saved.train.epochs) == (steps, None)
    assert Trainer(parse_run(content)).done
    with pytest.raises(UserError, match=r"takes the place of train.steps.*train.epochs = 'none'"):
        parse_run(content, ["--train.steps=7"])
    assert parse_run(content, ["--train.steps=7", "--train.epochs=null"]).train.steps == 7


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    fit(make_run(tmp_path, "--train.steps=3"))
    with pytest.raises(UserError, match=r"holds the state of optim.name='adamw', got 'adafactor'"):
        Trainer(make_run(tmp_path, "--optim.name=adafactor"))


def test_smoothing_and_z_loss_are_trained_and_not_evaluated(tmp_path: Path) -> None:
    plain = make_run(tmp_path, "--train.steps=1", f"--run.dir={tmp_path}/plain")
    other = make_run(
        tmp_path,
        "--train.steps=1",
        "--optim.lr=0",
        "--loss.label_smoothing=0.2",
        "--loss.z_loss=0.1",
        f"--run.dir={tmp_path}/other",
    )
    fit(plain)
    fit(other)
    (one,), (two,) = metrics(plain), metrics(other)
    # The normaliser of 258 words at the start is near 258, and its log squared near 31.
    assert two["loss"] == pytest.approx(one["loss"] + 0.1 * math.log(258) ** 2, rel=0.02)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=0.01)


def without_a_file_on_rank_1(run: RunFile, function: str) -> str:
    """What a rank hears where another one's disk lacks something."""

    def missing(*_: Any, **__: Any) -> Any:
        raise UserError("there is no such file")

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(function, missing)
        with pytest.raises(UserError) as caught:
            Trainer(run)
    return str(caught.value)


@pytest.mark.parametrize(
    "function", ["expertmesh.train.loop.build_data", "expertmesh.train.published._folder"]
)
def test_all_ranks_hear_what_one_does_not_find(tmp_path: Path, function: str) -> None:
    run = make_run(tmp_path, "--mesh.ep=2", f"--init.from={tmp_path}")
    answers = run_on_ranks(2, without_a_file_on_rank_1, run, function, timeout=60)
    assert answers == ["rank 1: there is no such file"] * 2
