"""The ``block_sparse`` backend in Triton's interpreter against the definition in float64.

Blocks are small, so that small problems have many of them. bfloat16 is left to the GPU.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.backends import Problem, choose, explain
from expertmesh.kernels.moe_mlp import MLP_BACKENDS
from expertmesh.kernels.moe_mlp.block_sparse.backend import BlockSparseMLP
from expertmesh.testing import assert_close
from tests.kernels.cases import (
    Case,
    assert_differentiable_once,
    assert_equal_to_reference,
    call,
    make_case,
    run,
    strided,
)

BACKEND = next(b for b in MLP_BACKENDS if isinstance(b, BlockSparseMLP))
PROBLEM = Problem(
    device=torch.device("cpu"),
    dtype=torch.float32,
    num_experts=8,
    num_assignments=64,
    dim=16,
    hidden=16,
    needs_grad=True,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKEND, "block", 16)


def case_of(**changes: object) -> Case:
    return make_case(**{"rows": 40, "dim": 21, "hidden": 35, "dtype": torch.float32, **changes})


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gelu", "gelu_tanh", "relu2")]


@pytest.mark.parametrize("activation", ["silu", "relu", *SLOW])
@pytest.mark.parametrize("gated", [0, 1, 2])
def test_matches_reference(activation: str, gated: int) -> None:
    assert_equal_to_reference(case_of(gated=gated, activation=activation), "block_sparse")


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 0},
        {"rows": 0, "gated": 0, "bias": False},
        {"rows": 1, "k": 1, "sentinels": 0.0},
        {"num_experts": 1, "sentinels": 0.0},
        {"sentinels": 1.0},
        {"dim": 1, "hidden": 1},
        {"dim": 8, "hidden": 80, "bias": False},
        {"dim": 32, "hidden": 32, "rows": 64, "num_experts": 2, "k": 1, "sentinels": 0.0},
    ],
    ids=str,
)
def test_corners(shape: dict[str, int | float]) -> None:
    assert_equal_to_reference(case_of(**shape), "block_sparse")


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    dim=st.integers(1, 40),
    hidden=st.integers(1, 40),
    num_experts=st.integers(1, 7),
    k=st.integers(1, 4),
    gated=st.integers(0, 2),
    bias=st.booleans(),
    sentinels=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 100),
)
def test_any_shape(**shape: object) -> None:
    assert_equal_to_reference(case_of(**shape), "block_sparse")


def test_blocks_of_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKEND, "block", 128)
    assert_equal_to_reference(case_of(rows=150, hidden=130, num_experts=3), "block_sparse")


def test_all_rows_to_one_expert_and_twice() -> None:
    case = case_of(sentinels=0.0)
    one = replace(case, expert=torch.full_like(case.expert, 2))
    assert_equal_to_reference(one, "block_sparse")


def test_float16() -> None:
    assert_equal_to_reference(case_of(dtype=torch.float16), "block_sparse", 2e-3)


def test_an_activation_of_ones_own_that_is_not_zero_at_zero() -> None:
    assert_equal_to_reference(case_of(activation=torch.cos), "block_sparse")


def test_sentinels_contribute_nothing_whatever_they_hold() -> None:
    case = case_of(rows=6, k=2, sentinels=0.0)
    case.expert[0], case.expert[1, 0] = 6, 6
    clean = run(case, "block_sparse")
    x, weight = case.x.clone(), case.weight.clone()
    x[0], weight[0], weight[1, 0] = float("nan"), float("nan"), float("inf")
    dirty = run(replace(case, x=x, weight=weight), "block_sparse")
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name


def test_a_row_of_nan_stays_with_its_token_and_experts() -> None:
    """Padding repeats rows that belong elsewhere: theirs must not reach other experts."""
    case = case_of(rows=9, num_experts=3, k=1, sentinels=0.0, bias=False)
    case.expert[:, 0] = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 2])
    x = case.x.clone()
    x[4] = float("nan")
    result = run(replace(case, x=x), "block_sparse")
    assert torch.isfinite(result["y"][[0, 1, 2, 3, 5, 6, 7, 8]]).all()
    assert torch.isfinite(result["dup"][:2]).all()
    assert torch.isfinite(result["ddown"][:2]).all()


def test_idle_expert_has_zero_gradient() -> None:
    case = case_of()
    assert not (case.expert == 1).any()
    result = run(case, "block_sparse")
    for name in ("dup", "ddown", "dup_bias", "ddown_bias"):
        assert result[name][1].count_nonzero() == 0


@pytest.mark.parametrize("wanted", ["x", "weight", "up", "down", "up_bias", "down_bias"])
def test_one_gradient_alone(wanted: str) -> None:
    case = case_of()
    leaves = {name: value.clone() for name, value in case.tensors.items()}
    leaves[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(call(case, leaves, "block_sparse"), leaves[wanted], case.dy)
    assert_close(wanted, grad, run(case.to(torch.float64), "reference")[f"d{wanted}"].float())


def test_strided_inputs() -> None:
    assert_equal_to_reference(strided(case_of()), "block_sparse")


def test_second_derivative_is_refused() -> None:
    assert_differentiable_once(case_of(), "block_sparse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "it takes bfloat16, float16 and float32, not torch.float64"),
        ({"dropout": True}, "it drops no hidden units"),
        ({"compiling": True}, "torch.compile does not trace its products"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(MLP_BACKENDS, replace(PROBLEM, **change), "block_sparse")


def test_runs_only_if_asked_for() -> None:
    explanation = explain(MLP_BACKENDS, PROBLEM)
    assert explanation.chosen.name != "block_sparse"
    assert "block_sparse" in explanation.reasons
    assert not BACKEND.suits(PROBLEM)
    assert choose(MLP_BACKENDS, PROBLEM, "block_sparse") is BACKEND
