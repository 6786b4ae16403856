"""OpenMoE trained on instructions: every plugin, continued, saved, and made to speak."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from expertmesh.layer import moe_layers
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.train.loop import Trainer
from expertmesh.train.mesh import MeshConfig
from expertmesh.train.run_file import load_run_file, parse_run
from tests.openmoe.instructions import tables, write_records
from tests.train.tiny import Silent

EXAMPLES = Path(__file__).parents[2] / "examples" / "openmoe"
PLUGINS = ["ep", "ep_zero", "hybrid"]


def trained(values: dict[str, Any]) -> list[float]:
    """A run's losses, step by step."""
    display = Silent()
    Trainer(parse_run(values)).fit(display)
    return display.losses


def seen(values: dict[str, Any]) -> list[float]:
    """The same on a rank whose display is not asked."""
    display = Silent()
    trainer = Trainer(parse_run(values))
    trainer.fit(display)
    return [entry["loss"] for entry in display.entries]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openmoe")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    return trained(tables(folder, name="alone"))


@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_plugin_on_four_ranks_has_the_losses_of_one_process(
    folder: Path, alone: list[float], plugin: str
) -> None:
    views = run_on_ranks(4, seen, tables(folder, name=plugin, strategy=plugin))
    assert alone[-1] < alone[0] - 0.5
    for view in views:
        assert view == pytest.approx(alone, rel=2e-5)


def test_a_resumed_run_continues_exactly(folder: Path) -> None:
    whole = tables(folder, name="whole", strategy="ep_zero")
    halves = tables(folder, name="halves", strategy="ep_zero")
    expected = run_on_ranks(4, seen, whole)[0]
    first = run_on_ranks(4, seen, halves | {"train": halves["train"] | {"steps": 3}})[0]
    rest = run_on_ranks(4, seen, halves)[0]
    assert first + rest == expected


def test_adafactors_state_goes_on_elsewhere(folder: Path) -> None:
    def values(name: str, plugin: str | None, steps: int) -> dict[str, Any]:
        content = tables(folder, name=name, strategy=plugin)
        content["train"] |= {"steps": steps}
        return content | {
            "optim": {"name": "adafactor", "lr": 1e-2, "schedule": "inverse_sqrt"},
        }

    expected = trained(values("factored", None, 6))
    first = run_on_ranks(4, seen, values("moved", "ep_zero", 3))[0]
    rest = run_on_ranks(4, seen, values("moved", "hybrid", 6))[0]
    assert first + rest == pytest.approx(expected, rel=2e-5)
    assert expected[-1] < expected[0]


def test_what_was_trained_is_saved_and_speaks(folder: Path) -> None:
    values = tables(folder, name="speaks")
    values["data"]["source"] = str(write_records(folder / "few.jsonl", 10))
    values["optim"] |= {"lr": 1e-2, "schedule": "cosine"}
    values["loss"] = {}
    values["train"] |= {"epochs": 80, "batch": 10, "micro_batch": 10, "save_published": True}
    del values["train"]["steps"]
    assert trained(values)[-1] < 0.05
    from expertmesh.hf import OpenMoeForCausalLM

    model = OpenMoeForCausalLM.from_pretrained(folder / "speaks" / "published")
    prompt = torch.tensor([list(b"Say four 1 times.")])
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=256)
    text = bytes(token for token in answer[0, prompt.shape[1] :].tolist() if token < 256)
    assert text.strip() == b"four"


def of_run_file(plugin: str, folder: Path, *overrides: str, alone: bool = False) -> list[float]:
    """A shipped run file's losses on this rank."""
    words = [f"--run.dir={folder / plugin}{'-alone' if alone else ''}", "--train.log_every=1"]
    run = load_run_file(EXAMPLES / f"test-{plugin}.toml", [*words, *overrides])
    if alone:
        run = replace(run, mesh=MeshConfig())
    display = Silent()
    Trainer(run).fit(display)
    return [entry["loss"] for entry in display.entries]


@pytest.mark.slow
def test_the_999_records_with_the_published_vocabulary_on_every_mesh(tmp_path: Path) -> None:
    short = ("--train.epochs=null", "--train.steps=3", "--train.micro_batch=8")
    short += ("--data.seq_len=64", "--data.val_fraction=0")
    expected = of_run_file("ep", tmp_path, *short, alone=True)
    for plugin in PLUGINS:
        for view in run_on_ranks(4, of_run_file, plugin, tmp_path, *short):
            assert view == pytest.approx(expected, rel=2e-5), plugin


BYTES = ("--data.tokenizer=byte", "--model.vocab_size=258", "--train.micro_batch=8")


@pytest.fixture(scope="module")
def epoch(folder: Path) -> list[float]:
    return of_run_file("ep", folder, *BYTES, alone=True)


@pytest.mark.slow
@pytest.mark.parametrize("plugin", PLUGINS)
def test_an_epoch_of_the_999_records_byte_by_byte(
    tmp_path: Path, epoch: list[float], plugin: str
) -> None:
    assert sum(epoch[-5:]) / 5 < sum(epoch[:2]) / 2 - 2.0
    view, *_ = run_on_ranks(4, of_run_file, plugin, tmp_path, *BYTES, timeout=600)
    # Rounding grows from step to step.
    assert view[:10] == pytest.approx(epoch[:10], rel=1e-4)
    assert view == pytest.approx(epoch, rel=1e-2)


# What follows are defects of the original trainer, by name.


def test_smoothed_targets_are_a_distribution_and_not_all_ones() -> None:
    """A loss of about log V, where all ones gave V log V: 3e6 a token with 256,384 words."""
    torch.manual_seed(0)
    num_words = 4096
    hidden_ND, weight_VD = torch.randn(5, 8) * 1e-3, torch.randn(num_words, 8)
    logits_NV = (hidden_ND @ weight_VD.T).requires_grad_()
    eye = torch.eye(num_words)
    kind = CrossEntropy(label_smoothing=0.001)
    loss = linear_cross_entropy(logits_NV, eye, torch.arange(5), kind)
    loss.backward()
    assert loss.item() / 5 == pytest.approx(torch.tensor(float(num_words)).log().item(), rel=1e-2)
    assert logits_NV.grad is not None
    # Probabilities minus targets: both add up to 1.
    assert float(logits_NV.grad.sum(1).abs().max()) < 1e-5


def gradients(values: dict[str, Any], batch: Batch) -> tuple[float, dict[str, Tensor]]:
    trainer = Trainer(parse_run(values))
    trainer.model.train()
    loss = float(trainer.stepper.accumulate(1, batch))
    return loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def batch_of(values: dict[str, Any]) -> Batch:
    return Trainer(parse_run(values)).loader.batch(0)


def test_the_loss_is_a_mean_so_router_losses_weigh_the_same_beside_any_number_of_tokens(
    folder: Path,
) -> None:
    """The original summed over tokens: the balance loss was thousands of times too weak."""
    values = tables(folder, name="mean")
    values["model"]["router_options"] = {"balance_coef": 1.0, "z_coef": 0.1}
    values["train"] |= {"batch": 32, "micro_batch": 32}
    once = batch_of(values).rows(0, 8)
    thrice = Batch(
        once.tokens_BS.repeat(3, 1),
        once.targets_BS.repeat(3, 1),
        None if once.padding_mask_BS is None else once.padding_mask_BS.repeat(3, 1),
        once.sample_index_B.repeat(3),
    )
    loss, expected = gradients(values, once)
    same, got = gradients(values, thrice)
    assert same == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        assert_close(name, got[name], gradient, 1e-4)


def test_padding_is_neither_trained_on_nor_routed(folder: Path) -> None:
    values = tables(folder, name="padding")
    batch = batch_of(values)
    mask_BS = batch.padding_mask_BS
    assert mask_BS is not None
    assert bool(mask_BS.any())
    assert bool((batch.targets_BS[mask_BS] == IGNORE).all())
    loss, expected = gradients(values, batch)
    other = Batch(
        batch.tokens_BS.masked_fill(mask_BS, 65), batch.targets_BS, mask_BS, batch.sample_index_B
    )
    same, got = gradients(values, other)
    assert same == loss
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name
    trainer = Trainer(parse_run(values))
    trainer.stepper.accumulate(1, batch)
    for moe in moe_layers(trainer.model).values():
        assert float(moe.metrics()["load"].value.sum()) == 2 * int((~mask_BS).sum())


def test_prompts_do_not_train_unless_asked(folder: Path) -> None:
    values = tables(folder, name="prompts")
    batch = batch_of(values)
    answers = [bytes(t for t in row.tolist() if 0 <= t < 256) for row in batch.targets_BS]
    assert all(b"Say" not in answer and answer.strip() for answer in answers)
    asked = batch_of(values | {"data": values["data"] | {"train_on_prompt": True}})
    assert asked.num_targets > 2 * batch.num_targets
    assert torch.equal(asked.tokens_BS, batch.tokens_BS)


def test_layers_begin_with_other_experts_and_the_seed_counts(folder: Path) -> None:
    values = tables(folder, name="seeds")
    one = Trainer(parse_run(values)).model
    other = Trainer(parse_run(values | {"run": values["run"] | {"seed": 8}})).model
    first, second = (moe.experts.down for moe in moe_layers(one).values())
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    again, _ = (moe.experts.down for moe in moe_layers(other).values())
    assert not torch.equal(first, again)
