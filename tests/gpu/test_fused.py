"""The fused kernels on a GPU: gradients, odd shapes, shipped plans, graphs, large offsets."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from expertmesh.kernels.layout import make_layout
from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.kernels.moe_mlp.fused import launch
from expertmesh.kernels.moe_mlp.fused.plan import SHIPPED, Gather
from expertmesh.testing import assert_close
from tests.kernels.cases import Case, assert_equal_to_reference, call, make_case, run

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SHAPES = [
    {"rows": 700, "dim": 128, "hidden": 96, "num_experts": 5, "k": 3},
    {"rows": 2000, "dim": 264, "hidden": 200, "num_experts": 6, "k": 2},
    {"rows": 1, "dim": 16, "hidden": 16, "num_experts": 4, "k": 1, "sentinels": 0.0},
    {"rows": 0, "dim": 16, "hidden": 16},
    {"rows": 40, "dim": 16, "hidden": 16, "sentinels": 1.0},
    {"rows": 3000, "dim": 512, "hidden": 1024, "num_experts": 8, "k": 2, "bias": False},
]


def cuda_case(dtype: torch.dtype, **shape: object) -> Case:
    return make_case(**shape, dtype=dtype).to(device="cuda")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(gated: bool, shape: dict[str, object]) -> None:
    assert_equal_to_reference(cuda_case(torch.bfloat16, gated=gated, **shape), "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("gated", [True, False])
def test_other_dtypes(dtype: torch.dtype, gated: bool) -> None:
    case = cuda_case(dtype, gated=gated, **SHAPES[1])
    assert_equal_to_reference(case, "triton", TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_activations(activation: str) -> None:
    case = cuda_case(torch.bfloat16, activation=activation, **SHAPES[0])
    assert_equal_to_reference(case, "triton")


def test_same_bits_every_time() -> None:
    case = cuda_case(torch.bfloat16, **SHAPES[5])
    first, second = run(case, "triton"), run(case, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_sentinels_stay_out() -> None:
    case = cuda_case(torch.bfloat16, rows=600, dim=64, hidden=64, k=2, sentinels=0.0)
    case.expert[:7] = case.up.shape[0]
    clean = run(case, "triton")
    x, weight = case.x.clone(), case.weight.clone()
    x[:7], weight[:7] = float("nan"), float("nan")
    for name, value in run(replace(case, x=x, weight=weight), "triton").items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("name", ["1536x256", "2048x1024"])
def test_shipped_plans(name: str) -> None:
    """Widths whose tiles were measured, with experts of many rows, one row and none."""
    assert name in SHIPPED.read_text(encoding="utf-8")
    dim, hidden = map(int, name.split("x"))
    case = make_case(900, dim, hidden, 6, 2, bias=False, dtype=torch.bfloat16, sentinels=0.1)
    case.expert[case.expert == 3] = 0
    case.expert[5, 0] = 3
    assert_equal_to_reference(case.to(device="cuda"), "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
def test_by_turns(gated: bool, dtype: torch.dtype) -> None:
    """Wide enough for turns in every product; experts of one row and of none, sentinels."""
    case = make_case(900, 256, 512, 6, 2, bias=False, gated=gated, dtype=dtype, sentinels=0.1)
    case.expert[case.expert == 3] = 0
    case.expert[5, 0] = 3
    case.expert[case.expert == 5] = 4
    assert_equal_to_reference(case.to(device="cuda"), "triton", TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("dim", "hidden", "k"), [(128, 128, 3), (384, 256, 6), (256, 384, 1)])
def test_rows_gathered_on_the_way(
    dim: int, hidden: int, k: int, gated: bool, dtype: torch.dtype
) -> None:
    """Narrow experts; of many rows, of one and of none, and sentinels."""
    case = make_case(1300, dim, hidden, 7, k, bias=False, gated=gated, dtype=dtype, sentinels=0.1)
    case.expert[case.expert == 3] = 0
    case.expert[5, 0] = 3
    case.expert[case.expert == 5] = 4
    assert_equal_to_reference(case.to(device="cuda"), "triton", TOLERANCE[dtype])


def test_gathered_rows_have_the_same_bits_every_time() -> None:
    case = cuda_case(torch.bfloat16, rows=5000, dim=512, hidden=256, num_experts=9, k=4)
    first, second = run(case, "triton"), run(case, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("hidden", [256, 512])
def test_rows_that_start_anywhere(hidden: int) -> None:
    """As a slice of a longer buffer has them: nothing can be copied there in pieces of 16 bytes."""
    case = cuda_case(torch.bfloat16, rows=1300, dim=256, hidden=hidden, num_experts=4, bias=False)

    def shifted(rows: torch.Tensor) -> torch.Tensor:
        buffer = rows.new_empty(rows.numel() + 1)
        return buffer[1:].view(rows.shape).copy_(rows)

    def results(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        leaves = {**case.tensors, "x": x.requires_grad_()}
        leaves |= {name: leaves[name].requires_grad_() for name in ("up", "down")}
        y = call(case, leaves, "triton")
        return [y, *torch.autograd.grad(y, [leaves[name] for name in ("x", "up", "down")], dy)]

    expected = results(case.x.clone(), case.dy)
    x, dy = shifted(case.x), shifted(case.dy)
    assert x.data_ptr() % 16 == dy.data_ptr() % 16 == 2
    for value, found in zip(expected, results(x, dy), strict=True):
        assert torch.equal(value, found)


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("tile", [Gather(), Gather(gathered=256, grouped=128, group=2)])
def test_sums_over_gathered_rows(tile: Gather, flipped: bool) -> None:
    """Widths that leave a part of the tile empty; each expert's sum against float64."""
    rows, dim, hidden, num_experts, k = 2000, 512, 192, 5, 3
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=g)

    expert = torch.randint(0, num_experts + 1, (rows, k), device="cuda", generator=g)
    expert[expert == 2] = 0
    layout = make_layout(expert, num_experts, 128)
    ends = layout.offset_E1.tolist()
    x, parts = normal(rows, dim), 1 if flipped else 2
    grouped = normal(rows * k, parts * hidden)
    grouped[ends[-1] :] = 0
    shape = (num_experts, dim, hidden) if flipped else (num_experts, parts, hidden, dim)
    like = normal(*shape)
    found = launch.weight_gradient(grouped, x, layout, k, like, tile, flipped=flipped)
    for e, (start, stop) in enumerate(pairwise(ends)):
        left = grouped[start:stop].double().T
        right = x[layout.order_N[start:stop].long() // k].double()
        wanted = right.T @ left.T if flipped else (left @ right).view(like.shape[1:])
        assert_close(f"expert {e}", found[e].double(), wanted, 1e-2)
        if start == stop:
            assert not found[e].any()


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_activations_by_turns(activation: str) -> None:
    case = make_case(900, 128, 512, 3, 2, activation=activation, dtype=torch.bfloat16)
    assert_equal_to_reference(case.to(device="cuda"), "triton")


def test_layout_of_many_rows() -> None:
    expert_RK = torch.randint(0, 97, (40_000, 8), device="cuda")
    layout = make_layout(expert_RK, 96, 128)
    expected = torch.sort(expert_RK.flatten(), stable=True).indices
    valid = int((expert_RK < 96).sum())
    assert torch.equal(layout.order_N[:valid].long(), expected[:valid])
    assert int(layout.offset_E1[-1]) == valid


def test_nothing_waits_for_the_device() -> None:
    case = cuda_case(torch.bfloat16, **SHAPES[5])
    run(case, "triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_records_into_a_cuda_graph() -> None:
    case = cuda_case(torch.bfloat16, **SHAPES[5])
    expected = run(case, "triton")
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}

    def step() -> list[torch.Tensor]:
        y = call(case, leaves, "triton")
        return [y, *torch.autograd.grad(y, list(leaves.values()), case.dy)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for result in results:
        result.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for (name, value), result in zip(expected.items(), results, strict=True):
        assert torch.equal(value, result.detach()), name


def test_compiles_without_breaks() -> None:
    case = cuda_case(torch.bfloat16, **SHAPES[0])
    expected = run(case, "triton")
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
    y = torch.compile(lambda: call(case, leaves, "triton"), fullgraph=True)()
    assert_close("y", y, expected["y"], 2e-2)
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(name, grad, expected[f"d{name}"], 2e-2)


def test_offsets_beyond_32_bits() -> None:
    """The pre-activation has more than 2^31 elements; the last rows are as right as the first."""
    rows, dim, hidden, num_experts = 600_000, 64, 1856, 2
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.bfloat16)

    x, dy = normal(rows, dim).requires_grad_(), normal(rows, dim)
    up, down = normal(num_experts, 2, hidden, dim) / 8, normal(num_experts, dim, hidden) / 43
    up, down = up.requires_grad_(), down.requires_grad_()
    expert = torch.arange(rows, device="cuda").view(-1, 1) * num_experts // rows
    weight = torch.rand(rows, 1, device="cuda", generator=g)
    assert rows * 2 * hidden > 2**31
    y = moe_mlp(x, expert, weight, up, down, backend="triton")
    dx, dup, ddown = torch.autograd.grad(y, [x, up, down], dy)
    expected_up, expected_down = (
        torch.zeros_like(dup[1]).float(),
        torch.zeros_like(ddown[1]).float(),
    )
    for part in torch.arange(rows // 2, rows, device="cuda").split(50_000):
        leaves = [t.detach().float().requires_grad_() for t in (x[part], up[1], down[1])]
        gate, linear = (leaves[0] @ leaves[1].flatten(0, 1).T).chunk(2, dim=-1)
        z = weight[part] * ((torch.nn.functional.silu(gate) * linear) @ leaves[2].T)
        wanted = torch.autograd.grad(z, leaves, dy[part].float())
        expected_up += wanted[1]
        expected_down += wanted[2]
    assert_close("y", y[part].float(), z, 2e-2)
    assert_close("dx", dx[part].float(), wanted[0], 2e-2)
    assert_close("dup", dup[1].float(), expected_up, 2e-2)
    assert_close("ddown", ddown[1].float(), expected_down, 2e-2)
