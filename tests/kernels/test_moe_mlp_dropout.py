"""Dropout of hidden units: every backend that has it against the definition, in float64."""

import dataclasses

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.activations import hidden_units
from expertmesh.kernels.backends import Problem
from expertmesh.kernels.moe_mlp import MLP_BACKENDS, moe_mlp
from expertmesh.kernels.moe_mlp.dropout import HiddenDropout
from expertmesh.random import bits
from expertmesh.testing import assert_close
from tests.kernels.cases import Case, make_case

RULE = HiddenDropout(0.4, first_expert=3, first_unit=5)


def draws(case: Case) -> Tensor:
    return bits(7, torch.arange(len(case.x)))


def call(case: Case, tensors: dict[str, Tensor], backend: str) -> Tensor:
    return moe_mlp(
        tensors["x"],
        case.expert,
        tensors["weight"],
        tensors["up"],
        tensors["down"],
        up_bias=tensors.get("up_bias"),
        down_bias=tensors.get("down_bias"),
        activation=case.activation,
        dropout=RULE,
        draw_R=draws(case),
        backend=backend,
    )


def defined(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """Row by row and choice by choice, with the mask looked up unit by unit."""
    num_experts, num_parts = len(case.up), case.up.shape[1] if case.up.dim() == 4 else 1
    rows = []
    for r, x in enumerate(tensors["x"]):
        total = 0 * x
        for k, e in enumerate(case.expert[r].tolist()):
            if e == num_experts:
                continue
            pre = tensors["up"][e].flatten(0, -2) @ x
            if "up_bias" in tensors:
                pre = pre + tensors["up_bias"][e].flatten()
            hidden = hidden_units(torch.nn.functional.silu, pre, num_parts)
            mask = RULE.factor(draws(case)[r : r + 1], e, hidden[None])[0]
            out = tensors["down"][e] @ (hidden * mask)
            if "down_bias" in tensors:
                out = out + tensors["down_bias"][e]
            total = total + tensors["weight"][r, k] * out
        rows.append(total)
    return torch.stack(rows) if rows else 0 * tensors["x"]


def outputs_and_gradients(case: Case, forward) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
    y = forward(case, leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy, materialize_grads=True)
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


CASES = {
    "gated": {},
    "plain": {"gated": 0},
    "doubly gated": {"gated": 2, "bias": False},
    "one row": {"rows": 1, "k": 1},
    "no rows": {"rows": 0},
    "sentinels only": {"sentinels": 1.0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("backend", ["reference", "loop"])
def test_backends_are_the_definition(backend: str, options: dict) -> None:
    case = make_case(**options)
    expected = outputs_and_gradients(case, defined)
    actual = outputs_and_gradients(case, lambda c, t: call(c, t, backend))
    for name, value in expected.items():
        assert_close(name, actual[name], value)


@pytest.mark.parametrize("gated", [0, 1, 2])
def test_grouped_products_are_the_loop(gated: int) -> None:
    case = make_case(dim=8, hidden=12, gated=gated, dtype=torch.float32)
    expected = outputs_and_gradients(case, lambda c, t: call(c, t, "loop"))
    actual = outputs_and_gradients(case, lambda c, t: call(c, t, "grouped_mm"))
    for name, value in expected.items():
        assert_close(name, actual[name], value)


def test_compiled_is_the_loop() -> None:
    case = make_case(dim=8, hidden=12)
    expected = outputs_and_gradients(case, lambda c, t: call(c, t, "loop"))
    compiled = torch.compile(lambda t: call(case, t, "loop"), backend="aot_eager", fullgraph=True)
    actual = outputs_and_gradients(case, lambda c, t: compiled(t))
    torch.compiler.reset()
    for name, value in expected.items():
        assert_close(name, actual[name], value)


def test_slices_of_experts_and_hidden_units_drop_what_the_whole_drops() -> None:
    draw_N, like_NF = bits(1, torch.arange(50)), torch.zeros(50, 12)
    whole = [HiddenDropout(0.3).factor(draw_N, e, like_NF) for e in range(4)]
    for expert in range(2):
        part = HiddenDropout(0.3, first_expert=2, first_unit=8)
        assert torch.equal(part.factor(draw_N, expert, like_NF[:, :4]), whole[expert + 2][:, 8:])


def test_fractions_and_scale() -> None:
    draw_N, like_NF = bits(1, torch.arange(400)), torch.zeros(400, 100, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        factors = torch.cat([HiddenDropout(p).factor(draw_N, e, like_NF) for e in range(3)])
        assert set(factors.unique().tolist()) == {0.0, 1 / (1 - p)}
        fraction = float((factors == 0).double().mean())
        # Four standard errors of 120,000 draws; also by hidden unit and by row.
        assert fraction == pytest.approx(p, abs=4 * (p * (1 - p) / factors.numel()) ** 0.5)
        for dim in (0, 1):
            spread = (factors == 0).double().mean(dim).std()
            expected = (p * (1 - p) / factors.shape[dim]) ** 0.5
            assert float(spread) == pytest.approx(expected, rel=0.25)


def test_experts_drop_each_its_own() -> None:
    draw_N, like_NF = bits(1, torch.arange(200)), torch.zeros(200, 50)
    one, two = (HiddenDropout(0.5).factor(draw_N, e, like_NF) > 0 for e in (0, 1))
    assert float((one == two).double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("backend", ["gather", "decode", "triton"])
def test_fused_backends_refuse_by_name(backend: str) -> None:
    case = make_case(dtype=torch.float32)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=f"'{backend}' cannot run this: it drops no hidden units"),
    ):
        call(case, case.tensors, backend)


def test_auto_finds_one_that_drops() -> None:
    problem = Problem(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        num_experts=8,
        num_assignments=16,
        dim=16,
        hidden=16,
        needs_grad=False,
        dropout=True,
    )
    able = {b.name for b in MLP_BACKENDS if b.refusal(problem) is None}
    assert able == {"grouped_mm", "loop", "reference"}
    without = dataclasses.replace(problem, dropout=False)
    assert MLP_BACKENDS[1].refusal(without) is None


def test_both_or_neither() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="dropout and draw_R go together"):
        moe_mlp(case.x, case.expert, case.weight, case.up, case.down, dropout=RULE)
