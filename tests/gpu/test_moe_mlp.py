"""The backends on CUDA against the definition in float64 on the CPU. Run with ``-m gpu``."""

from dataclasses import replace

import pytest
import torch

from expertmesh.testing import assert_close
from tests.kernels.cases import Case, assert_equal_to_reference, call, make_case, run

pytestmark = pytest.mark.gpu

BACKENDS = ["loop", "gather", "grouped_mm", "block_sparse", "auto"]
SHAPES = [
    {"rows": 64, "dim": 64, "hidden": 32, "num_experts": 8, "k": 2},
    {"rows": 300, "dim": 128, "hidden": 96, "num_experts": 5, "k": 3, "bias": False},
    {"rows": 48, "dim": 64, "hidden": 32, "num_experts": 8, "k": 8},
    {"rows": 1, "dim": 16, "hidden": 16, "num_experts": 4, "k": 1, "sentinels": 0.0},
    {"rows": 0, "dim": 16, "hidden": 16},
    {"rows": 40, "dim": 16, "hidden": 16, "sentinels": 1.0},
]


def cuda_case(dtype: torch.dtype, **shape: object) -> Case:
    return make_case(**shape, dtype=dtype).to(device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(backend: str, gated: int, shape: dict[str, object]) -> None:
    assert_equal_to_reference(cuda_case(torch.float32, gated=gated, **shape), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(backend: str, gated: int, shape: dict[str, object]) -> None:
    assert_equal_to_reference(cuda_case(torch.bfloat16, gated=gated, **shape), backend)


@pytest.mark.parametrize("backend", ["loop", "gather", "auto"])
def test_float64(backend: str) -> None:
    assert_equal_to_reference(cuda_case(torch.float64, **SHAPES[0]), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend: str, dtype: torch.dtype) -> None:
    case = cuda_case(dtype, rows=500, dim=64, hidden=64)
    first, second = run(case, backend), run(case, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_sentinels_stay_out(backend: str) -> None:
    case = cuda_case(torch.bfloat16, rows=6, dim=16, hidden=16, k=2, sentinels=0.0)
    case.expert[0] = case.up.shape[0]
    clean = run(case, backend)
    x, weight = case.x.clone(), case.weight.clone()
    x[0], weight[0] = float("nan"), float("nan")
    for name, value in run(replace(case, x=x, weight=weight), backend).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("backend", ["gather", "grouped_mm"])
def test_nothing_waits_for_the_device(backend: str) -> None:
    case = cuda_case(torch.bfloat16, rows=8, dim=64, hidden=64)
    run(case, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_records_into_a_cuda_graph(backend: str) -> None:
    case = cuda_case(torch.bfloat16, rows=4, dim=64, hidden=64)
    with torch.no_grad():
        expected = call(case, case.tensors, backend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(case, case.tensors, backend)
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert_close("y", y, expected)


def test_loop_says_that_it_cannot_be_recorded() -> None:
    case = cuda_case(torch.float32, rows=4)
    with (
        pytest.raises(ValueError, match="row counts are read on the host"),
        torch.no_grad(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(case, case.tensors, "loop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_compile(dtype: torch.dtype) -> None:
    case = cuda_case(torch.float32, rows=64, dim=64, hidden=64, k=2)
    expected = run(case, "reference")
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    leaves = {name: value.requires_grad_() for name, value in case.tensors.items()}
    for wrap in (lambda function: function, lambda f: torch.compile(f, fullgraph=True)):
        with torch.autocast("cuda", dtype=dtype):
            y = wrap(lambda: call(case, leaves, "auto"))()
        assert_close("y", y, expected["y"], tolerance)
        for name, grad in zip(
            leaves, torch.autograd.grad(y, list(leaves.values()), case.dy), strict=True
        ):
            assert_close(name, grad, expected[f"d{name}"], tolerance)
