"""The decoding kernels under Triton's interpreter against the definition in float64."""

from dataclasses import replace

import pytest
import torch

from expertmesh.kernels.moe_mlp import decode, moe_mlp
from expertmesh.testing import assert_close
from tests.kernels.cases import Case, call, make_case

SHAPES = [
    {"rows": 2, "k": 3},
    {"rows": 5, "dim": 20, "hidden": 9},
    {"rows": 13, "k": 3},
    {"rows": 20, "dim": 70, "hidden": 66, "num_experts": 3},
    {"rows": 70, "num_experts": 1, "k": 1},
]


def assert_decodes(case: Case, tol: float | None = None) -> None:
    exact = case.to(torch.float64)
    y = call(case, case.tensors, "decode")
    assert_close("y", y, call(exact, exact.tensors, "reference").to(y.dtype), tol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matches_reference(
    shape: dict[str, int], gated: int, bias: bool, dtype: torch.dtype
) -> None:
    assert_decodes(make_case(**shape, gated=gated, bias=bias, dtype=dtype))


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("activation", ["silu", "relu", "relu2", "gelu", "gelu_tanh"])
def test_named_activations(rows: int, activation: str) -> None:
    assert_decodes(make_case(rows, activation=activation, dtype=torch.float32))


@pytest.mark.parametrize("rows", [3, 20])
def test_gate_and_linear_half_interleaved(rows: int) -> None:
    case = make_case(rows, dtype=torch.float32)
    assert_decodes(replace(case, up=case.up.transpose(1, 2).contiguous().transpose(1, 2)))


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 0},
        {"rows": 1, "k": 1, "sentinels": 0.0},
        {"rows": 1, "num_experts": 1, "k": 1, "dim": 1, "hidden": 1, "sentinels": 0.0},
        {"rows": 3, "sentinels": 1.0},
        {"rows": 30, "sentinels": 1.0},
    ],
    ids=str,
)
def test_corners(shape: dict[str, float]) -> None:
    assert_decodes(make_case(**shape, dtype=torch.float32))


@pytest.mark.parametrize("rows", [4, 30])
def test_one_expert_takes_all_and_twice(rows: int) -> None:
    case = make_case(rows, sentinels=0.0, dtype=torch.float32)
    assert_decodes(replace(case, expert=torch.full_like(case.expert, 2)))


@pytest.mark.parametrize("rows", [4, 30])
def test_sentinels_stay_out_whatever_they_hold(rows: int) -> None:
    case = make_case(rows, k=2, sentinels=0.0, dtype=torch.float32)
    case.expert[0], case.expert[1, 0] = 6, 6
    clean = call(case, case.tensors, "decode")
    x, weight = case.x.clone(), case.weight.clone()
    x[0], weight[0], weight[1, 0] = float("nan"), float("nan"), float("inf")
    dirty = replace(case, x=x, weight=weight)
    assert torch.equal(clean, call(dirty, dirty.tensors, "decode"))
    assert clean[0].count_nonzero() == 0


@pytest.mark.parametrize("rows", [4, 30])
def test_strided_inputs(rows: int) -> None:
    case = make_case(rows, dtype=torch.float32)
    assert_decodes(
        replace(
            case,
            x=case.x.t().contiguous().t(),
            weight=case.weight.t().contiguous().t(),
            expert=case.expert.t().contiguous().t(),
            up=case.up.mT.contiguous().mT,
        )
    )


@pytest.mark.parametrize("rows", [2, 30])
def test_compiles_as_one_graph(rows: int) -> None:
    case = make_case(rows, dtype=torch.float32)
    function = torch.compile(
        lambda: call(case, case.tensors, "decode"), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(function(), call(case, case.tensors, "decode"))


@pytest.mark.parametrize("rows", [2, 30])
def test_operations_describe_themselves(rows: int) -> None:
    case = make_case(rows, dtype=torch.float32)
    given = (case.x, case.expert, case.up, case.up_bias, "silu")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.expertmesh.decode_up, given, test_utils=checks)
    hidden, order, offset = torch.ops.expertmesh.decode_up(*given)
    given = (hidden, case.expert, case.weight, order, offset, case.down, None, torch.float32)
    torch.library.opcheck(torch.ops.expertmesh.decode_down, given, test_utils=checks)


def test_says_what_it_cannot_run() -> None:
    case = make_case(dtype=torch.float32)
    leaves = {name: value.clone().requires_grad_() for name, value in case.tensors.items()}
    with pytest.raises(ValueError, match="it has no gradient"):
        call(case, leaves, "decode")
    exact = case.to(torch.float64)
    with pytest.raises(ValueError, match="float16 and float32, not"):
        call(exact, exact.tensors, "decode")
    odd = replace(case, activation=lambda x: x)
    with pytest.raises(ValueError, match="activations by name"):
        call(odd, odd.tensors, "decode")
    rows = decode.MOST_ASSIGNMENTS + 1
    with pytest.raises(ValueError, match="at most 2048 assignments, not 2049"):
        moe_mlp(
            torch.zeros(rows, 4),
            torch.zeros(rows, 1, dtype=torch.int64),
            torch.zeros(rows, 1),
            torch.zeros(1, 4, 4),
            torch.zeros(1, 4, 4),
            backend="decode",
        )
