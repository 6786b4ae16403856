"""What a run would cost on ranks that are not there."""

import re
from typing import Any

import pytest

from expertmesh.errors import UserError
from expertmesh.train.config import RunFile
from expertmesh.train.fake_world import describe_fake_world
from expertmesh.train.run_file import parse_run

MODEL: dict[str, Any] = {
    "vocab_size": 258,
    "dim": 32,
    "num_layers": 4,
    "num_heads": 4,
    "num_experts": 16,
    "experts_per_token": 2,
    "expert_hidden": 16,
}


def _run(*overrides: str, **model: Any) -> RunFile:
    content = {"model": MODEL | model, "data": {"seq_len": 64}, "train": {"batch": 32}}
    return parse_run(content, overrides)


def _sizes(text: str, name: str) -> list[float]:
    """The bytes in a line of the tables."""
    units = {"B": 0, "KiB": 1, "MiB": 2, "GiB": 3, "TiB": 4}
    line = next(line for line in text.splitlines() if line.startswith(f"  {name}"))
    return [float(n) * 1024 ** units[u] for n, u in re.findall(r"([\d.]+) ([KMGT]?i?B)", line)]


def test_eight_ranks_share_experts_and_optimizer() -> None:
    one = describe_fake_world(_run(), 1)
    eight = describe_fake_world(_run("--mesh.ep=8"), 8)
    assert "8: dp=8, ep=8; ZeRO 2, experts 2" in eight
    assert "32 sequences of 64 tokens in 1 micro-batch; at most 256 tokens" in eight
    for name in ("parameters", "optimizer state"):
        (alone,), (shared,) = _sizes(one, name), _sizes(eight, name)
        assert shared == pytest.approx(alone / 8, rel=0.06)
    assert _sizes(one, "all-to-all") == [0]
    assert _sizes(eight, "all-to-all")[0] > 0
    together = sum(
        _sizes(eight, name)[0]
        for name in ("parameters", "gathered", "gradients", "optimizer", "activations")
    )
    assert _sizes(eight, "together")[0] == pytest.approx(together, rel=0.06)


def test_each_pipeline_rank_has_a_column_and_large_pipelines_some() -> None:
    two = describe_fake_world(_run("--mesh.pp=2", "--train.micro_batch=8"), 8)
    assert "pp rank 0   pp rank 1" in two
    assert "in 4 micro-batches" in two
    assert len(_sizes(two, "send")) == 2
    eight = describe_fake_world(_run("--mesh.pp=8", num_layers=8), 16)
    assert [int(n) for n in re.findall(r"pp rank (\d)", eight)[:6]] == [0, 1, 2, 3, 4, 7]


def test_thousands_of_ranks_take_seconds() -> None:
    text = describe_fake_world(_run("--mesh.ep=16", "--mesh.zero=3", dim=256, num_layers=1), 4096)
    assert "4,096: dp=4096, edp=256, ep=16; ZeRO 3, experts 3" in text


def test_rounded_and_recomputed_runs_say_so() -> None:
    run = _run("--train.precision=bf16", "--train.checkpoint_activations=true", "--mesh.ep=2")
    text = describe_fake_world(run, 4)
    assert "bf16, blocks recomputed" in text
    assert _sizes(text, "rounded")[0] > 0
    static = _run("--mesh.dispatch=static", "--mesh.ep=2", router="switch", experts_per_token=1)
    assert "empty rows besides" in describe_fake_world(static, 4)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["--mesh.ep=3"], 9, "ep must divide the number of experts"),
        (["--mesh.tp=3"], 8, "tp"),
        (["--mesh.pp=8"], 8, "every stage needs a block"),
        ([], 0, "--fake-world must be at least 1"),
    ],
)
def test_runs_that_do_not_fit(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe_fake_world(_run(*overrides), world)


def test_the_optimizers_state_is_of_the_runs_optimizer() -> None:
    adamw = _sizes(describe_fake_world(_run(), 1), "optimizer state")[0]
    small = _sizes(describe_fake_world(_run("--optim.name=adafactor"), 1), "optimizer state")[0]
    assert small < adamw / 10
