import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.models import decoder_preset
from expertmesh.train.config import as_key, differences
from expertmesh.train.run_file import SECTIONS, load_run_file, parse_run
from tests.train.tiny import make_run, tables


def test_overrides_win_and_take_either_form(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--optim.lr=3e-4", "--train.steps", "9", "--eval.batches=null")
    assert (run.optim.lr, run.train.steps, run.eval.batches) == (3e-4, 9, None)
    assert run.train.batch == 4


def test_preset_gives_values_that_fields_override() -> None:
    content = {"model": {"preset": "nano", "num_experts": 16}, "data": {"source": "x"}}
    assert parse_run(content).model.num_experts == 16
    dense = parse_run(content, ["--model.preset=nano-dense", "--model.num_experts=0"]).model
    assert dense.num_moe_layers == 0


def test_resolved_config_is_a_run_file_of_the_same_run(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        "--model.router_options.balance_coef=0.02",
        "--data.mix={'a \"quoted\" name.txt': 2, b: 0.5}",
        "--data.source=",
        "--data.fields=[title, text]",
    )
    assert parse_run(tomllib.loads(run.to_toml())) == run
    assert load_run_file(run.save()) == run
    assert run.data.mix == {'a "quoted" name.txt': 2.0, "b": 0.5}


def test_options_of_the_router_merge_key_by_key() -> None:
    content = {
        "model": {"preset": "nano", "router_options": {"z_coef": 0.5}},
        "data": {"source": "x"},
    }
    run = parse_run(content, ["--model.router_options.balance_coef=0.25"])
    assert run.model.router_options == {"z_coef": 0.5, "balance_coef": 0.25}


def test_options_go_over_the_presets_one_by_one() -> None:
    def options(model: dict[str, Any]) -> dict[str, Any]:
        content = {"model": {"preset": "nano"} | model, "data": {"source": "x"}}
        return parse_run(content).model.router_options

    assert options({}) == {"balance_coef": 0.01}
    assert options({"router_options": {"z_coef": 0.5}}) == {"balance_coef": 0.01, "z_coef": 0.5}
    assert options({"router_options": {"balance_coef": 0.5}}) == {"balance_coef": 0.5}
    same = {"router": "mixtral", "router_options": {"z_coef": 0.5}}
    assert options(same) == {"balance_coef": 0.01, "z_coef": 0.5}
    # What Mixtral's router is given means nothing to another, which would refuse it.
    other = {"router": "sinkhorn", "router_options": {"rounds": 10}}
    assert options(other) == {"rounds": 10}
    assert decoder_preset("nano").router_options == {"balance_coef": 0.01}


@pytest.mark.parametrize("by_flag", [False, True])
def test_another_router_takes_nothing_of_the_presets(by_flag: bool) -> None:
    def options(*words: str) -> dict[str, Any]:
        given = {} if by_flag else {"router": "sinkhorn"}
        flags = ["--model.router=sinkhorn"] if by_flag else []
        content = {"model": {"preset": "nano"} | given, "data": {"source": "x"}}
        return parse_run(content, [*flags, *words]).model.router_options

    assert options() == {}
    assert options("--model.router_options.rounds=10") == {"rounds": 10}


def test_the_shipped_pretraining_keeps_the_presets_losses() -> None:
    run = load_run_file(Path(__file__).parents[2] / "examples" / "openmoe" / "pretrain.toml")
    expected = decoder_preset("openmoe-test").router_options
    assert run.model.router_options == expected | {"capacity": "jax"}


def test_tables_within_options_merge_key_by_key() -> None:
    capacity = {"factor": 2.0, "eval_factor": 3.0}
    content = {
        "model": {"preset": "nano", "router_options": {"capacity": capacity}},
        "data": {"source": "x"},
    }
    words = ["--model.router_options.capacity.factor=1.5", "--model.router_options.z_coef=0.5"]
    options = parse_run(content, words).model.router_options
    capacity_now = {"factor": 1.5, "eval_factor": 3.0}
    assert options == {"balance_coef": 0.01, "capacity": capacity_now, "z_coef": 0.5}
    assert capacity["factor"] == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--train.stpes=3", r"unknown option --train.stpes; did you mean 'train.steps'\?"),
        ("--lr=3", r"unknown option --lr; did you mean 'optim.lr'\?"),
        ("--trian.steps=3", r"did you mean 'train.steps'\?"),
        ("--train.steps=many", "train.steps: expected an integer, got 'many'"),
        ("--train.compile=perhaps", "train.compile: expected true or false, got 'perhaps'"),
        (
            "--optim.schedule=cos",
            "expected one of 'cosine', .*'inverse_sqrt', got 'cos'",
        ),
        ("--train.micro_batch=1.5", "train.micro_batch: expected an integer or 'none', got '1.5'"),
        ("--train.micro_batch=3", "must divide train.batch=4, got 3; set train.micro_batch = 2"),
        ("--train.micro_batch=0", "train.micro_batch must be at least 1, got 0"),
        ("--train.steps=0", "train.steps must be at least 1, got 0; set train.steps = 1"),
        ("--train.keep=0", "train.keep must be at least 1, got 0"),
        ("--eval.batches=0", "eval.batches must be at least 1, got 0"),
        ("--optim.lr=-1", "optim.lr must not be negative, got -1.0"),
        ("--optim.beta1=1", "optim.beta1 must be at least 0 and below 1, got 1.0"),
        ("--optim.final=2", "optim.final must be between 0 and 1, got 2.0"),
        ("--optim.eps=0", "optim.eps must be above 0 and finite, got 0.0"),
        ("--optim.decay_steps=5", "decay_steps=5 with schedule='cosine'; set both or none"),
        ("--optim.schedule=wsd", "decay_steps=0 with schedule='wsd'; set both or none"),
        ("--model.losses=return", "model.losses must be 'attach' in a run, got 'return'"),
        ("--model.router_options.capacity=0", "capacity must be a table of factor, .*, got 0"),
        (
            "--model.router_options.capacity.factor=-1",
            "capacity factor must be a finite number above 0, got -1",
        ),
        ("--model.router_options.capacity.factor=two", "must be a finite number, got 'two'"),
        ("--model.router_options.capacity.facto=1", r"did you mean 'factor'\?"),
        ("--model.router_options.balance_coef=x", "balance_coef must be a finite number"),
        ("--run.dir=", "run.dir must name a folder"),
        ("--data.seq_len=0", "data.seq_len must be at least 1"),
        ("--train=3", "--train is a table; set a field of it"),
        ("--train.steps.more=3", "unknown option --train.steps.more; train.steps is no table"),
        ("--model.experts_per_token=9", "must be between 1 and num_experts=4, got 9"),
        ("--model.preset=nanoo", r"model.preset: .*did you mean 'nano'\?"),
        ("--model.router=mixtrl", r"\[model\] router must be .*did you mean 'mixtral'\?"),
        ("--train.epochs=0", "train.epochs must be above 0, got 0"),
        ("--loss.z_loss=-1", r"loss.z_loss must be at least 0 and finite, got -1.0"),
        ("--loss.z_loss=.inf", r"loss.z_loss must be at least 0 and finite, got inf"),
        ("--loss.label_smoothing=1", "loss.label_smoothing must be at least 0 and below 1"),
        ("--optim.beta2_decay=0.5", r"optim.beta2_decay is of optim.name = 'adafactor'"),
        ("--data.mix=classics", "data.mix: expected a table of values, each a number"),
        ("--data.mix.my-notes=much", "each a number, got 'my-notes=much'"),
        ("--data.mix.a.txt=3", r"""or write the whole table: --data.mix='{"a.txt": 3}'"""),
        ("--data.source.a-b=3", "unknown option --data.source.a-b; data.source is no table"),
        ("--model.router_options.z-coef=3", "'--model.router_options.z-coef=3'; .* plain words"),
        ("--init.form=x", r"unknown option --init.form; did you mean 'init.from'\?"),
        ("--loss.z_loss=much", "loss.z_loss: expected a number, got 'much'"),
        ("--mesh.ep=0", "mesh.ep must be at least 1, got 0"),
        ("--train.steps", "--train.steps needs a value"),
        ("steps=3", "unexpected argument 'steps=3'"),
    ],
)
def test_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_run(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstpes = 3", r"unknown key train.stpes; did you mean 'train.steps'\?"),
        ("[trian]\nsteps = 3", r"unknown table \[trian\]; did you mean 'train'\?"),
        ("train = 3", r"train must be a table, got 3; write \[train\]"),
        ('[train]\nsteps = "many"', "train.steps: expected an integer, got 'many'"),
        ('[train]\nsteps = "2"', "train.steps: expected an integer, got '2'"),
        ('[train]\ncompile = "true"', "train.compile: expected true or false, got 'true'"),
        ('[train]\nmicro_batch = "2"', "micro_batch: expected an integer or 'none', got '2'"),
        ('[optim]\nlr = "3e-3"', "optim.lr: expected a number, got '3e-3'"),
        ('[data]\nmix = {a = "2"}', "data.mix: expected a table of .*, got {'a': '2'}"),
        ("[data]\nmix = '{a: 2}'", "data.mix: expected a table of .*, got '{a: 2}'"),
        ('[train.steps]\na = "2"', "train.steps: expected an integer, got {'a': '2'}"),
        ("[train]\nsteps = 2.5", "train.steps: expected an integer, got 2.5"),
        ("[data]\nsource = 3", "data.source: expected a string, got 3"),
        ("[model]\npreset = 3", "model.preset: expected a string, got 3"),
        ("[model]\nrouter_options = 3", "router_options: expected a table of values"),
        ('[data]\nsource = "x"', "model.vocab_size has no default.*or set model.preset"),
        ("[train", "is not valid TOML"),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_run_file(path)


def test_an_override_wins_over_a_wrong_value_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\npreset = 3\n[data]\nsource = 5\nmix = "x"\n[train]\nsteps = [1]\nbatch = "2"\n'
    )
    words = ["--model.preset=nano", "--data.source=", '--data.mix={"a.txt" = 2}']
    run = load_run_file(path, [*words, "--train.steps=7", "--train.batch=2"])
    assert (run.train.steps, run.train.batch, run.data.mix) == (7, 2, {"a.txt": 2.0})
    with pytest.raises(UserError, match=r"train.steps: expected an integer, got \[1\]"):
        load_run_file(path, [*words, "--train.batch=2"])
    content = tables(tmp_path)
    content["model"] |= {"dim": "x"}
    assert parse_run(content, ["--model.dim=32"]).model.dim == 32
    with pytest.raises(UserError, match=r"model.dim: expected an integer, got 'y'"):
        parse_run(content, ["--model.dim=y"])


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.toml does not exist"):
        load_run_file(tmp_path / "nowhere.toml")


def test_differences_name_field_and_values(tmp_path: Path) -> None:
    old, new = make_run(tmp_path), make_run(tmp_path, "--train.steps=9", "--run.seed=8")
    assert differences(old, new) == ["run.seed: 7 -> 8", "train.steps: 6 -> 9"]


@pytest.mark.parametrize("table", ["router_options={}", "router_options.capacity=none"])
def test_a_table_and_a_part_of_it_are_not_both_set(tmp_path: Path, table: str) -> None:
    part = "--model.router_options.capacity.factor=2.0"
    with pytest.raises(UserError, match=r"--model.router_options\S* and --model.*capacity.factor"):
        make_run(tmp_path, f"--model.{table}", part)
    assert make_run(tmp_path, part).model.router_options == {"capacity": {"factor": 2.0}}


def test_a_null_in_a_preset_stays_a_null() -> None:
    content = {"model": {"preset": "qwen3-30b-a3b"}, "data": {"source": "x"}}
    run = parse_run(content, ["--model.num_kv_heads=null"])
    assert parse_run(tomllib.loads(run.to_toml())).model.num_kv_heads is None


def test_an_evaluation_of_all_batches_stays_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--eval.batches=null")
    assert run.eval.batches is None
    assert load_run_file(run.save()) == run
    content = tables(tmp_path) | {"eval": {"batches": "none"}}
    assert parse_run(content).eval.batches is None


def test_a_null_takes_a_routers_option_away_for_good(tmp_path: Path) -> None:
    words = ["--model.router=switch", "--model.experts_per_token=1"]
    run = make_run(tmp_path, *words, "--model.router_options.capacity=null")
    assert run.model.build_router().capacity is None
    assert load_run_file(run.save()) == run
    assert run == make_run(tmp_path, *words, "--model.router_options.capacity=none")
    assert make_run(tmp_path, *words).model.build_router().capacity is not None


OPTIONAL = [
    ("train", "micro_batch", 2),
    ("train", "epochs", 2.0),
    ("data", "pack", False),
    ("data", "cache", "somewhere"),
    ("mesh", "strategy", "ep"),
    ("model", "num_kv_heads", 1),
    ("eval", "batches", 2),
]


@pytest.mark.parametrize(("section", "key", "other"), OPTIONAL)
def test_none_is_the_same_word_in_a_file_and_on_the_command_line(
    section: str, key: str, other: Any
) -> None:
    def value(given: Any, *words: str) -> Any:
        content: dict[str, Any] = {"model": {"preset": "nano"}, "data": {"source": "x"}}
        content[section] = content.get(section, {}) | {key: given}
        return getattr(getattr(parse_run(content, words), section), key)

    assert value(other) == other
    assert value("none") is None
    for words in (["=none"], ["=null"], ["", "none"]):
        assert value(other, f"--{section}.{key}{words[0]}", *words[1:]) is None


def test_none_over_a_value_of_the_preset() -> None:
    content = {"model": {"preset": "qwen3-30b-a3b"}, "data": {"source": "x"}}
    assert parse_run(content).model.num_kv_heads == 4
    assert parse_run(content, ["--model.num_kv_heads=none"]).model.num_kv_heads is None
    content["model"]["num_kv_heads"] = "none"
    assert parse_run(content).model.num_kv_heads is None


def test_where_none_is_a_value_it_stays_one(tmp_path: Path) -> None:
    words = ["--run.resume=none", "--model.qk_norm=none", "--data.source=none"]
    run = make_run(tmp_path, *words)
    assert (run.run.resume, run.model.qk_norm, run.data.source) == ("none", "none", "none")


@pytest.mark.parametrize(
    "table",
    [
        '{"notes/a.txt": 2, "my-notes": 0.5}',
        "{notes/a.txt: 2, my-notes: 0.5}",
        '{"notes/a.txt" = 2, my-notes = 0.5}',
    ],
    ids=["json", "yaml", "toml"],
)
def test_a_mixture_may_be_written_as_a_table(tmp_path: Path, table: str) -> None:
    run = make_run(tmp_path, "--data.source=", f"--data.mix={table}")
    assert run.data.mix == {"notes/a.txt": 2.0, "my-notes": 0.5}


@pytest.mark.parametrize("name", ["classics", "my-notes", "a b", "notes/a", "hf:x/y@z:train[:10%]"])
def test_one_weight_of_a_mixture(tmp_path: Path, name: str) -> None:
    content = tables(tmp_path)
    content["data"] |= {"source": "", "mix": {"notes/a.txt": 2.0, "my-notes": 0.5}}
    for words in ([f"--data.mix.{name}=3"], [f"--data.mix.{name}", "3"]):
        assert parse_run(content, words).data.mix == {"notes/a.txt": 2.0, "my-notes": 0.5, name: 3}


def test_options_may_be_a_table_of_toml() -> None:
    content = {"model": {"preset": "nano"}, "data": {"source": "x"}}
    expected = {"balance_coef": 0.01, "capacity": {"factor": 1.5}}
    for word in ("={balance_coef = 0.01, capacity = {factor = 1.5}}", ".capacity={factor = 1.5}"):
        run = parse_run(content, [f"--model.router_options{word}"])
        assert run.model.router_options == expected


def test_tables_of_the_test_are_a_run(tmp_path: Path) -> None:
    assert parse_run(tables(tmp_path)).schedule(2) == 1.0


def test_the_page_on_training_names_every_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for section, kind in SECTIONS.items():
        if section != "model":
            for field in fields(kind):
                key = as_key(field.name)
                assert re.search(rf"`({section}\.)?{key}`", page), f"{section}.{key}"


def test_the_examples_are_run_files() -> None:
    for path in (Path(__file__).parents[2] / "examples").glob("*.toml"):
        run = load_run_file(path)
        assert run.model.num_experts % 4 == 0
        assert run.mesh.build(1, run.model.num_experts, torch.device("cpu")) is None


def test_a_key_that_is_a_word_of_python_goes_there_and_back(tmp_path: Path) -> None:
    run = parse_run(tables(tmp_path) | {"init": {"from": "one"}})
    assert run.init.from_ == "one"
    assert make_run(tmp_path, "--init.from=two").init.from_ == "two"
    assert tomllib.loads(run.to_toml())["init"] == {"from": "one"}
    assert differences(run, make_run(tmp_path)) == ["init.from: 'one' -> ''"]
