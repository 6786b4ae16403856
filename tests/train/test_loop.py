import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.testing import run_on_ranks
from expertmesh.train.config import RunFile
from expertmesh.train.loop import Trainer
from expertmesh.train.passes import OneByOne
from expertmesh.train.run_file import load_run_file, parse_run
from expertmesh.train.step import Stepper
from tests.train.tiny import Silent, fit, make_run, metrics, tables


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
