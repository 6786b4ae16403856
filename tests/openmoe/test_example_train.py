"""The example's flat flags: each means what it says, or is refused; shipped run files agree."""

import importlib.util
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.models import DecoderLM, decoder_preset
from expertmesh.train import toml
from expertmesh.train.config import RunFile
from expertmesh.train.run_file import load_run_file, parse_run
from tests.openmoe.instructions import write_records

EXAMPLES = Path(__file__).parents[2] / "examples" / "openmoe"


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("openmoe_train", EXAMPLES / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def run_of(*flags: str, world: int = 8) -> RunFile:
    return parse_run(SCRIPT.tables(SCRIPT.parser().parse_args(flags), world))


def test_the_seeds_defaults() -> None:
    run = run_of()
    assert (run.run.dir, run.train.epochs, run.train.save_every) == ("./outputs", 1, 1000)
    assert (run.train.precision, run.data.seq_len) == ("bf16", 2048)
    assert (run.optim.lr, run.optim.weight_decay) == (1e-5, 0)
    assert run.data.source == "hf:yizhongw/self_instruct@super_natural_instructions"
    assert (run.loss.label_smoothing, run.loss.z_loss) == (0.0, 1e-4)
    assert run.train.batch == 8
    assert run.init.from_ == "hpcai-tech/openmoe-base"
    assert run.run.seed == 42


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("size", ["test", "base", "8b"])
def test_the_defaults_fit_any_number_of_ranks(world: int, size: str) -> None:
    """The original's, hybrid with ZeRO 2, ended in an assertion."""
    run = run_of("--model_name", size, world=world)
    from expertmesh.parallel.grid import Grid

    mesh = run.mesh
    assert Grid.infer(world, pp=mesh.pp, dp=-1, edp=-1, ep=mesh.ep).world == world


EFFECTS: dict[str, tuple[str, Any]] = {
    "--output_path=out": ("run.dir", "out"),
    "--num_epochs=3": ("train.epochs", 3.0),
    "--num_epoch=0.5": ("train.epochs", 0.5),
    "--batch_size=4": ("train.batch", 32),
    "--save_interval=7": ("train.save_every", 7),
    "-i=7": ("train.save_every", 7),
    "--precision=fp16": ("train.precision", "fp16"),
    "--max_length=128": ("data.seq_len", 128),
    "--dataset=alpaca-demo": ("data.source", "alpaca-demo"),
    "-d=own/set": ("data.source", "hf:own/set@super_natural_instructions"),
    "--task_name=p3": ("data.source", "hf:yizhongw/self_instruct@p3"),
    "--lr=0.01": ("optim.lr", 0.01),
    "--weight_decay=0.1": ("optim.weight_decay", 0.1),
    "--zero_stage=3": ("mesh.zero", 3),
    "--seed=3": ("run.seed", 3),
    "--label_smoothing=0.25": ("loss.label_smoothing", 0.25),
    "--z_loss_factor=0.5": ("loss.z_loss", 0.5),
    "--model_name=8b": ("model.num_experts", 32),
    "--init_from=none": ("init.from_", ""),
    "--init_from=folder": ("init.from_", "folder"),
    "--router_aux_loss_factor=3": (
        "model.router_options",
        {"balance_coef": 1.0, "z_coef": 1e-4 / 3},
    ),
    "--router_z_loss_factor=6": ("model.router_options", {"balance_coef": 0.01 / 3, "z_coef": 2.0}),
}


@pytest.mark.parametrize("flag", EFFECTS)
def test_every_flag_is_wired(flag: str) -> None:
    field, expected = EFFECTS[flag]
    value: Any = run_of(flag.replace("-i=", "-i").replace("-d=", "-d"))
    for name in field.split("."):
        value = getattr(value, name)
    assert value == expected


MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "--plugin=ep": (8, {"pp": 1, "ep": 8, "zero": 2, "placement": "inside"}),
    "--plugin=ep_zero": (8, {"ep": 4, "zero": 1, "expert_zero": 1, "placement": "outside"}),
    "--plugin=ep_zero --extra_dp_size=4": (8, {"ep": 2}),
    "--plugin=ep_zero --zero_stage=2": (8, {"zero": 2, "expert_zero": 2}),
    "--plugin=hybrid": (8, {"pp": 2, "ep": 4, "zero": 1}),
    "--plugin=hybrid --zero_stage=2": (4, {"pp": 2, "zero": 2}),
    "--plugin=hybrid --pp_size=4": (8, {"pp": 4, "ep": 2}),
    "--plugin=hybrid --pp_size=2 --dp_size=2 --ep_size=2": (8, {"pp": 2, "ep": 2, "edp": 2}),
    "--plugin=hybrid --ep_size=1": (4, {"pp": 2, "ep": 1}),
}


@pytest.mark.parametrize("flags", MESHES)
def test_plugins_are_meshes(flags: str) -> None:
    world, expected = MESHES[flags]
    run = run_of(*flags.split(), "--model_name=test", world=world)
    assert {name: getattr(run.mesh, name) for name in expected} == expected


def test_the_batch_is_per_data_rank() -> None:
    run = run_of("--plugin=hybrid", "--batch_size=6", "--microbatch_size=2")
    assert (run.train.batch, run.train.micro_batch) == (24, 8)
    assert run_of("--plugin=hybrid", "--batch_size=6").train.micro_batch == 4
    assert run_of("--plugin=ep", "--batch_size=6").train.micro_batch == 48


MISTAKES = {
    "--plugin=ep_zer": r"--plugin must be one of ep, ep_zero, hybrid, got 'ep_zer'.*'ep_zero'",
    "--plugin=ep --pp_size=2": r"--pp_size is for --plugin hybrid, got 2 with --plugin ep",
    "--plugin=hybrid --extra_dp_size=2": r"--extra_dp_size is for --plugin ep_zero",
    "--plugin=ep --ep_size=2": r"--ep_size is for --plugin hybrid",
    "--plugin=hybrid --dp_size=0": r"--dp_size must be at least 1, got 0",
    "--plugin=hybrid --pp_size=3": r"--pp_size must be at least 2 and divide the 8 ranks, got 3",
    "--plugin=ep_zero --extra_dp_size=3": r"ep_zero needs a multiple of 3 ranks, got 8",
    "--batch_size=3 --microbatch_size=2": r"--microbatch_size must divide --batch_size=3",
    "--load_balance": r"--load_balance is not supported: .*--router_aux_loss_factor",
    "--load_balance_interval=5": r"--load_balance_interval is not supported",
    "--comm_overlap": r"--comm_overlap is not supported: .*ep_zero",
    "--hierarchical_alltoall": r"--hierarchical_alltoall is not supported: .*mesh.placement",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_what_cannot_be_is_refused(flags: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[flags]):
        run_of(*flags.split())


@pytest.mark.parametrize(
    "flags", ["--zero_stage=4", "--precision=fp8", "--model_name=9b", "--lrr=1"]
)
def test_values_that_are_none_of_a_flags_are_named(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_of(flags)
    assert flags.partition("=")[0] in capsys.readouterr().err


def test_kernels_that_cannot_run_are_listed() -> None:
    lines = SCRIPT.kernels("cpu", "bf16")
    assert lines == [
        "skipped  flash attention (SDPA's): needs a CUDA device",
        "skipped  Triton kernels of experts and routers: needs a CUDA device",
    ]
    assert "needs bf16 or fp16" in SCRIPT.kernels("cuda", "fp32")[0]


def test_apexs_norm_is_an_error_without_apex_and_used_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = DecoderLM(decoder_preset("openmoe-test", vocab_size=32))
    with pytest.raises(UserError, match=r"needs apex.*python -m pip install .*--cuda_ext"):
        SCRIPT.main(["--model_name", "test", "--use_layernorm_kernel"])
    calls = []

    def norm(x: torch.Tensor, weight: torch.Tensor, shape: Any, eps: float) -> torch.Tensor:
        calls.append(eps)
        return torch.nn.functional.rms_norm(x, shape, weight, eps)

    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["apex.normalization.fused_layer_norm"].fused_rms_norm_affine = norm  # type: ignore[attr-defined]  # stands in
    tokens = torch.tensor([[1, 2, 3]])
    expected = model(tokens)
    SCRIPT.use_norm(model, SCRIPT.apex_norm())
    torch.testing.assert_close(model(tokens), expected)
    # Four blocks with two norms each, two of them with a third, and the last norm.
    assert calls == [1e-6] * 11


@pytest.mark.parametrize("plugin", ["ep", "ep_zero", "hybrid"])
@pytest.mark.parametrize("size", ["base", "8b"])
def test_shipped_run_files_say_what_the_flags_say(size: str, plugin: str) -> None:
    shipped = load_run_file(EXAMPLES / f"{size}-{plugin}.toml")
    flags = ["--model_name", size, "--plugin", plugin]
    if plugin == "hybrid":
        flags += ["--batch_size", "8"]
    flagged = run_of(*flags, f"--output_path={shipped.run.dir}", world=8)
    assert shipped.model == flagged.model
    for table in ("run", "init", "data", "loss", "train", "optim"):
        assert getattr(shipped, table) == getattr(flagged, table), table
    resolved = shipped.mesh.resolve(8, shipped.model.num_experts)
    assert resolved == flagged.mesh


@pytest.mark.parametrize("plugin", ["ep", "ep_zero", "hybrid"])
def test_the_test_sizes_run_files_are_one_run_on_three_meshes(plugin: str) -> None:
    run = load_run_file(EXAMPLES / f"test-{plugin}.toml")
    other = load_run_file(EXAMPLES / "test-ep.toml", [f"--run.dir={run.run.dir}"])
    assert (run.model, run.data, run.loss, run.optim) == (
        other.model,
        other.data,
        other.loss,
        other.optim,
    )
    assert run.train.batch == other.train.batch
    assert run.mesh.strategy == plugin


def output_of(command: list[str], folder: Path) -> str:
    run = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_script_runs_with_its_defaults_on_four_ranks(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records.jsonl", 12)
    flags = ["--model_name", "test", "-d", str(records), "--max_length", "32", "--use_kernel"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    text = output_of([*command, str(EXAMPLES / "train.py"), *flags], tmp_path)
    assert "global batch: 4 = 1 x 4 data ranks" in text
    assert text.count("[mesh]") == 1, "one rank prints the run file"
    assert "step 3/3" in text
    published = tmp_path / "outputs" / "published"
    assert (published / "config.json").is_file()
    assert (published / "spiece.model").is_file(), "the tokenizer goes with the weights"


@pytest.mark.slow
def test_the_shell_script_runs_as_committed(tmp_path: Path) -> None:
    fewer = ["--train.epochs=null", "--train.steps=2", "--data.seq_len=32"]
    script = ["bash", str(EXAMPLES / "train.sh"), f"--run.dir={tmp_path / 'run'}"]
    text = output_of([*script, *fewer], tmp_path)
    assert "step 2/2" in text
    assert (tmp_path / "run" / "published" / "model.safetensors").is_file()


@pytest.mark.parametrize(("name", "value"), [("MODEL", "34b"), ("PLUGIN", "eep")])
def test_the_shell_script_names_what_there_is(name: str, value: str) -> None:
    done = subprocess.run(
        ["bash", str(EXAMPLES / "train.sh")],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "MODEL is test, base or 8b, PLUGIN ep, ep_zero or hybrid, got" in done.stderr
    assert f"{name}={value}" in done.stderr


def test_what_is_printed_is_a_run_file_that_gives_the_same_run() -> None:
    flags = SCRIPT.parser().parse_args(["--plugin=hybrid", "-d", "alpaca-demo"])
    content = SCRIPT.tables(flags, 8)
    assert parse_run(tomllib.loads(toml.dumps(content))) == parse_run(content)
