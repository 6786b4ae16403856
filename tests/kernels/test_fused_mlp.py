"""The fused kernels in Triton's interpreter against the definition in float64.

Tiles are small, so that small problems have many of them, with tails in every direction. bfloat16
is left to the tests on a GPU: the interpreter multiplies it wrongly.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from expertmesh.kernels.moe_mlp.fused import run as fused_run
from expertmesh.kernels.moe_mlp.fused.plan import Plan, Tile
from expertmesh.kernels.moe_mlp.problem import MLPOperands
from expertmesh.testing import assert_close
from tests.kernels.cases import (
    Case,
    assert_differentiable_once,
    assert_equal_to_reference,
    call,
    interleaved,
    make_case,
    run,
    strided,
)

TILE = Tile(columns=32, depth=16, warps=4, stages=2, group=2, rows=16)
PLAN = Plan(
    rows=16,
    up=TILE,
    down=TILE,
    dhidden=replace(TILE, chunks=2),
    dx=replace(TILE, depth=32),
    dup=TILE,
    ddown=TILE,
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_run, "_plan", lambda *operands, **options: PLAN)


def case_of(**changes: object) -> Case:
    return make_case(**{"dim": 40, "hidden": 24, "dtype": torch.float32, **changes})


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_matches_reference(activation: str, gated: bool) -> None:
    assert_equal_to_reference(case_of(rows=40, gated=gated, activation=activation), "triton")


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 0},
        {"rows": 1, "k": 1, "sentinels": 0.0},
        {"num_experts": 1, "sentinels": 0.0},
        {"sentinels": 1.0},
        {"dim": 8, "hidden": 80, "bias": False},
        {"dim": 16, "hidden": 16, "rows": 64, "num_experts": 2, "k": 1, "sentinels": 0.0},
    ],
    ids=str,
)
def test_corners(shape: dict[str, int | float]) -> None:
    assert_equal_to_reference(case_of(**shape), "triton")


def test_float16() -> None:
    assert_equal_to_reference(case_of(rows=40, dtype=torch.float16), "triton", 2e-3)


@pytest.mark.parametrize("shape", [{}, {"rows": 1, "k": 1}, {"sentinels": 1.0}], ids=str)
def test_gradients_from_rows_copied_by_position(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, int | float]
) -> None:
    copied = replace(PLAN, dup=None, ddown=None)
    monkeypatch.setattr(fused_run, "_plan", lambda *operands, **options: copied)
    assert_equal_to_reference(case_of(**shape), "triton")


def test_large_values() -> None:
    for activation in ("silu", "gelu", "gelu_tanh"):
        case = case_of(bias=False, activation=activation)
        large = replace(case, x=case.x * 1e12, down=case.down * 1e-12)
        assert_equal_to_reference(large, "triton")


def test_sentinels_contribute_nothing_whatever_they_hold() -> None:
    case = case_of(rows=6, k=2, sentinels=0.0)
    case.expert[0], case.expert[1, 0] = 6, 6
    clean = run(case, "triton")
    x, weight = case.x.clone(), case.weight.clone()
    x[0], weight[0], weight[1, 0] = float("nan"), float("nan"), float("inf")
    dirty = run(replace(case, x=x, weight=weight), "triton")
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_idle_expert_has_zero_gradient() -> None:
    case = case_of()
    assert not (case.expert == 1).any()
    for name, value in run(case, "triton").items():
        if name in ("dup", "ddown", "dup_bias", "ddown_bias"):
            assert value[1].count_nonzero() == 0


@pytest.mark.parametrize("wanted", ["x", "weight", "up", "down", "up_bias", "down_bias"])
def test_one_gradient_alone(wanted: str) -> None:
    case = case_of()
    leaves = {name: value.clone() for name, value in case.tensors.items()}
    leaves[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(call(case, leaves, "triton"), leaves[wanted], case.dy)
    assert_close(wanted, grad, run(case, "reference")[f"d{wanted}"])


def test_interleaved_gate_and_up_are_read_in_place() -> None:
    """A parameter ``(E, F, 2, D)`` passed as ``(E, 2, F, D)``; its gradient has its strides."""
    case = interleaved(case_of())
    up = case.up
    assert not up.is_contiguous()
    leaves = {**case.tensors, "up": up.requires_grad_()}
    y = call(case, leaves, "triton")
    (dup,) = torch.autograd.grad(y, up, case.dy)
    assert dup.stride() == up.stride()
    expected = run(case, "reference")
    assert_close("y", y, expected["y"])
    assert_close("dup", dup, expected["dup"])


def test_interleaved_gate_and_up_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    case = interleaved(case_of())
    up = case.up.requires_grad_()

    def flattened(operands: MLPOperands) -> None:
        raise AssertionError("flattening these strides copies all matrices")

    monkeypatch.setattr(MLPOperands, "up_EHD", property(flattened))
    y = call(case, {**case.tensors, "up": up}, "triton")
    (dup,) = torch.autograd.grad(y, up, case.dy)
    assert dup.stride() == up.stride()


def test_matrices_that_start_anywhere_in_a_buffer() -> None:
    """The copy engine reads from multiples of 16 bytes."""
    case = case_of()

    def moved(matrices: torch.Tensor) -> torch.Tensor:
        buffer = matrices.new_empty(matrices.numel() + 1)[1:]
        return buffer.copy_(matrices.flatten()).view_as(matrices)

    shifted = {name: moved(getattr(case, name)).requires_grad_() for name in ("up", "down")}
    assert all(matrices.data_ptr() % 16 for matrices in shifted.values())
    y = call(case, {**case.tensors, **shifted}, "triton")
    expected = run(case, "reference")
    assert_close("y", y, expected["y"])
    gradients = torch.autograd.grad(y, list(shifted.values()), case.dy)
    for name, gradient in zip(shifted, gradients, strict=True):
        assert_close(f"d{name}", gradient, expected[f"d{name}"])


def test_strided_inputs() -> None:
    assert_equal_to_reference(strided(case_of()), "triton")


def test_second_derivative_is_refused() -> None:
    assert_differentiable_once(case_of(), "triton")


def test_compiles_as_one_graph() -> None:
    case = case_of()
    expected = run(case, "reference")
    leaves = {name: value.requires_grad_() for name, value in case.tensors.items()}
    function = torch.compile(
        lambda: call(case, leaves, "triton"), backend="aot_eager", fullgraph=True
    )
    y = function()
    assert_close("y", y, expected["y"])
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(name, grad, expected[f"d{name}"])


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("order", [replace, interleaved, strided])
def test_fakes_are_shaped_and_laid_out_as_the_real(
    order: Callable[[Case], Case], keep: bool
) -> None:
    case = order(case_of())
    given = (case.x, case.weight, case.up, case.down, case.up_bias, case.down_bias)
    fused, backward = torch.ops.expertmesh.fused_mlp, torch.ops.expertmesh.fused_mlp_backward
    arguments = (case.x, case.expert, *given[1:], "silu", torch.float32, keep)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.default, arguments, test_utils=tests)
    if not keep:
        return
    _, *kept = fused(*arguments)
    for wanted in ([True] * 6, [False] * 6):
        arguments = (case.dy, *given, *kept, "silu", wanted, False)
        torch.library.opcheck(backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 5}, r"dim must be a multiple of 4 for torch.float32, got 5"),
        ({"hidden": 7}, r"hidden must be a multiple of 4 for torch.float32, got 7"),
        ({"dtype": torch.float64}, r"it takes bfloat16, float16 and float32, not torch.float64"),
        ({"activation": torch.sigmoid}, r"its activations are gelu, gelu_tanh, relu, relu2, silu"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case_of(**change), "triton")
