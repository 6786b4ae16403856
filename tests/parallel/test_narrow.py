"""Experts whose weights are rounded before they are gathered: the same bits, half the bytes."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.data import Batch
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.fsdp import gradient_sync, parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import Shard
from expertmesh.testing import run_on_ranks
from expertmesh.testing.equivalence import pieces
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne
from expertmesh.train.precision import Precision
from expertmesh.train.step import Stepper
from tests.parallel.user_model import DIM, moe_of

BF16 = torch.bfloat16
CPU = torch.device("cpu")
CONFIG = DecoderConfig(
    vocab_size=40,
    dim=16,
    num_layers=2,
    num_heads=4,
    max_seq_len=16,
    num_experts=4,
    experts_per_token=2,
    expert_hidden=12,
)


def trained(
    degrees: dict[str, Any], expert_zero: int, narrow: torch.dtype | None
) -> tuple[list[tuple[float, float | None]], dict[str, Shard]]:
    """Two steps of three micro-batches in bfloat16: losses and norms, and the parameters."""
    mesh = Mesh(**degrees)
    model = DecoderLM(CONFIG, seed=3)
    parallelize(model, mesh, zero=1, expert_zero=expert_zero, narrow=narrow)
    passes = OneByOne(model, precision=Precision("bf16"), device=CPU, sequences=4, mesh=mesh)
    stepper = Stepper(passes, build_optimizer(model, OptimConfig(lr=1e-2)), seed=1, clip=0.5)
    results = []
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        tokens_BS = torch.randint(CONFIG.vocab_size, (12, 9), generator=generator)
        batch = Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], None, torch.arange(12))
        result = stepper.step(step, batch)
        results.append((result.loss, result.grad_norm))
    return results, pieces(model.named_parameters())


def differences(degrees: dict[str, Any], stages: list[int]) -> list[str]:
    """What differs by a bit between gathering in float32 and in bfloat16."""
    found = []
    for stage in stages:
        wide, narrow = (trained(degrees, stage, dtype) for dtype in (None, BF16))
        if wide[0] != narrow[0]:
            found.append(f"stage {stage}: {wide[0]} and {narrow[0]}")
        for name, shard in wide[1].items():
            if not torch.equal(shard.local, narrow[1][name].local):
                found.append(f"stage {stage}: {name}")
    return found


@pytest.mark.parametrize(
    ("degrees", "stages"),
    [({"edp": 2}, [0, 1, 2, 3]), ({"edp": 2, "ep": 2}, [1, 3])],
    ids=str,
)
def test_no_bit_depends_on_where_weights_are_rounded(
    degrees: dict[str, Any], stages: list[int]
) -> None:
    world = degrees["edp"] * degrees.get("ep", 1)
    assert run_on_ranks(world, differences, degrees, stages) == [[]] * world


class Traffic(TorchDispatchMode):
    """Numbers in gathers and sums, by kind and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind = {
            "_reduce_scatter_base_": "sums",
            "_allgather_base_": "gathers",
        }.get(function.name().removeprefix("c10d::"))
        if kind is not None:
            self.numel[kind, args[0].dtype] += max(args[0].numel(), args[1].numel())
        return function(*args, **(kwargs or {}))


def traffic(kind: str, dtype: torch.dtype) -> Counter[tuple[str, torch.dtype]]:
    """Of two micro-batches of a layer whose experts have copies on two ranks."""
    mesh = Mesh(edp=2)
    moe = moe_of(kind).to(dtype)
    parallelize(moe, mesh, zero=1, expert_zero=1, narrow=BF16)
    x_TD = torch.randn(6, DIM, dtype=dtype)
    with Traffic() as seen:
        for last in (False, True):
            gradient_sync(moe, last=last)
            with torch.autocast("cpu", BF16):
                y_TD = moe(x_TD)
            y_TD.sum().backward()
    return seen.numel


def test_gathers_are_narrow_and_sums_are_not() -> None:
    moe = moe_of()
    experts = sum(param.numel() for param in moe.experts.parameters())
    rest = sum(param.numel() for param in moe.parameters()) - experts
    expected = {
        ("gathers", BF16): experts,
        ("gathers", torch.float32): rest,
        ("sums", torch.float32): experts + rest,
    }
    assert run_on_ranks(2, traffic, "gated", torch.float32) == [expected] * 2


@pytest.mark.parametrize(("kind", "dtype"), [("module", torch.float32), ("gated", torch.float64)])
def test_what_autocast_does_not_round_is_gathered_as_it_is(kind: str, dtype: torch.dtype) -> None:
    for numel in run_on_ranks(2, traffic, kind, dtype):
        assert {dtype for _, dtype in numel} == {dtype}
