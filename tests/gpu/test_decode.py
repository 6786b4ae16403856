"""The decoding kernels on CUDA against the definition in float64. Run with ``-m gpu``."""

from dataclasses import replace

import pytest
import torch

from expertmesh.kernels.backends import Problem, choose
from expertmesh.kernels.moe_mlp import MLP_BACKENDS
from expertmesh.testing import assert_close
from tests.kernels.cases import Case, call, make_case

pytestmark = pytest.mark.gpu

SHAPES = [
    {"rows": 1, "dim": 64, "hidden": 48, "num_experts": 8, "k": 2, "sentinels": 0.0},
    {"rows": 5, "dim": 1000, "hidden": 500, "num_experts": 64, "k": 5},
    {"rows": 64, "dim": 64, "hidden": 96, "num_experts": 8, "k": 2},
    {"rows": 300, "dim": 200, "hidden": 136, "num_experts": 5, "k": 3},
    {"rows": 13, "k": 3},
    {"rows": 200, "dim": 64, "hidden": 64, "num_experts": 1, "k": 1, "sentinels": 0.0},
    {"rows": 0, "dim": 16, "hidden": 16},
    {"rows": 40, "dim": 16, "hidden": 16, "sentinels": 1.0},
]


def decode(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return call(case, case.tensors, "decode")


def assert_decodes(case: Case) -> None:
    exact = case.to(torch.float64, "cpu")
    y = decode(case)
    assert_close("y", y.cpu(), call(exact, exact.tensors, "reference").to(y.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("gated", "bias"), [(1, False), (1, True), (0, True), (2, True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(
    shape: dict[str, int], gated: int, bias: bool, dtype: torch.dtype
) -> None:
    assert_decodes(make_case(**shape, gated=gated, bias=bias, dtype=dtype).to(device="cuda"))


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("activation", ["silu", "relu", "relu2", "gelu", "gelu_tanh"])
def test_activations(rows: int, activation: str) -> None:
    case = make_case(rows, 64, 64, 16, activation=activation, dtype=torch.bfloat16)
    assert_decodes(case.to(device="cuda"))


@pytest.mark.parametrize("rows", [2, 40])
def test_gate_and_linear_half_interleaved(rows: int) -> None:
    case = make_case(rows, 64, 64, 16, dtype=torch.bfloat16).to(device="cuda")
    assert_decodes(replace(case, up=case.up.transpose(1, 2).contiguous().transpose(1, 2)))


def test_offsets_beyond_32_bits() -> None:
    """The last of 3 experts whose first projection has 2^30 numbers each."""
    case = make_case(3, 8, 8, 3, 1, dtype=torch.bfloat16, bias=False, sentinels=0.0).to(
        None, "cuda"
    )
    case = replace(case, expert=torch.full_like(case.expert, 2))
    up = torch.empty(3 << 30, device="cuda", dtype=torch.bfloat16)
    wide = up.as_strided(case.up.shape, (1 << 30, 64, 8, 1))
    wide.copy_(case.up)
    assert_decodes(replace(case, up=wide))


@pytest.mark.parametrize("rows", [2, 60, 400])
def test_same_bits_every_time(rows: int) -> None:
    case = make_case(rows, 64, 64, 16, dtype=torch.bfloat16).to(device="cuda")
    assert torch.equal(decode(case), decode(case))


@pytest.mark.parametrize("rows", [2, 60])
def test_sentinels_stay_out(rows: int) -> None:
    case = make_case(rows, 64, 64, 16, 2, dtype=torch.bfloat16, sentinels=0.0).to(device="cuda")
    case.expert[0] = 16
    clean = decode(case)
    x, weight = case.x.clone(), case.weight.clone()
    x[0], weight[0] = float("nan"), float("nan")
    assert torch.equal(decode(replace(case, x=x, weight=weight)), clean)


@pytest.mark.parametrize("rows", [1, 40])
def test_records_into_a_graph_that_follows_its_inputs(rows: int) -> None:
    """Replayed many times in a row on new ids: kernels overlap, and must still wait."""
    case = make_case(rows, 128, 96, 16, 2, dtype=torch.bfloat16, sentinels=0.0).to(device="cuda")
    decode(case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    x, expert = case.x.clone(), case.expert.clone()
    recorded = replace(case, x=x, expert=expert)
    with torch.cuda.graph(graph):
        y = decode(recorded)
        for _ in range(5):
            y = decode(replace(recorded, x=y))
    for seed in range(5):
        other = make_case(rows, 128, 96, 16, 2, dtype=torch.bfloat16, seed=seed, sentinels=0.0)
        x.copy_(other.x)
        expert.copy_(other.expert)
        graph.replay()
        expected = replace(case, x=x.clone(), expert=expert.clone())
        for _ in range(6):
            expected = replace(expected, x=decode(expected))
            torch.cuda.synchronize()
        assert torch.equal(y, expected.x)


def test_nothing_waits_for_the_device() -> None:
    case = make_case(40, 64, 64, 16, dtype=torch.bfloat16).to(device="cuda")
    decode(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rows", [2, 40])
def test_compiles(rows: int) -> None:
    case = make_case(rows, 64, 64, 16, dtype=torch.bfloat16).to(device="cuda")
    with torch.no_grad():
        y = torch.compile(lambda: call(case, case.tensors, "decode"), fullgraph=True)()
    assert torch.equal(y, decode(case))


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 128])
def test_auto_takes_it_for_decoding_only(tokens: int) -> None:
    common = {
        "device": torch.device("cuda", torch.cuda.current_device()),
        "dtype": torch.bfloat16,
        "num_experts": 64,
        "dim": 2048,
        "hidden": 1024,
    }
    problem = Problem(**common, num_assignments=tokens * 8, needs_grad=False)
    assert choose(MLP_BACKENDS, problem).name == "decode"
    problem = Problem(**common, num_assignments=tokens * 8, needs_grad=True)
    assert choose(MLP_BACKENDS, problem).name != "decode"
