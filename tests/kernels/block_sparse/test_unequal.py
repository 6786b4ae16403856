"""Experts of unequal width: the definition against stacked experts, the products against it."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.kernels.moe_mlp.block_sparse import unequal
from expertmesh.kernels.moe_mlp.block_sparse.unequal import BlockSparseUnequal, unequal_mlp
from expertmesh.testing import assert_close

WIDTHS = (40, 1, 16, 33, 7)
DIM = 13


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    (backend,) = (b for b in unequal.UNEQUAL_BACKENDS if isinstance(b, BlockSparseUnequal))
    monkeypatch.setattr(backend, "block", 16)


@dataclass(frozen=True)
class Unequal:
    tensors: dict[str, Tensor]
    expert: Tensor
    dy: Tensor
    widths: tuple[int, ...]
    activation: str = "silu"


def make(
    rows: int = 50,
    k: int = 2,
    widths: tuple[int, ...] = WIDTHS,
    *,
    dim: int = DIM,
    parts: int = 2,
    bias: bool = True,
    sentinels: float = 0.2,
    activation: str = "silu",
    seed: int = 0,
) -> Unequal:
    """float32 values; expert 1 has no rows where there are others."""
    g = torch.Generator().manual_seed(seed)
    num_experts, hidden = len(widths), sum(widths)
    expert = torch.randint(0, num_experts, (rows, k), generator=g)
    if num_experts > 1:
        expert[expert == 1] = 0
    expert[torch.rand(rows, k, generator=g) < sentinels] = num_experts
    shapes = {"x_RD": (rows, dim), "up_MHD": (parts, hidden, dim), "down_HD": (hidden, dim)}
    if bias:
        shapes |= {"up_bias_MH": (parts, hidden), "down_bias_ED": (num_experts, dim)}
    tensors = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    tensors["weight_RK"] = torch.rand(rows, k, generator=g)
    return Unequal(tensors, expert, torch.randn(rows, dim, generator=g), widths, activation)


def run(case: Unequal, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {n: t.to(dtype).requires_grad_() for n, t in case.tensors.items()}
    y = unequal_mlp(
        expert_RK=case.expert,
        **leaves,
        widths=case.widths,
        activation=case.activation,
        backend=backend,
    )
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def assert_equal_to_definition(case: Unequal) -> None:
    expected = run(case, "reference", torch.float64)
    for name, actual in run(case, "block_sparse", torch.float32).items():
        assert_close(name, actual, expected[name].float())


def test_definition_is_that_of_stacked_experts() -> None:
    """With one width the units of stacked experts, joined, give what stacked experts give."""
    case = make(widths=(6, 6, 6))
    leaves = {n: t.double().requires_grad_() for n, t in case.tensors.items()}
    y = moe_mlp(
        leaves["x_RD"],
        case.expert,
        leaves["weight_RK"],
        leaves["up_MHD"].unflatten(1, (3, 6)).transpose(0, 1),
        leaves["down_HD"].unflatten(0, (3, 6)).mT,
        up_bias=leaves["up_bias_MH"].unflatten(1, (3, 6)).transpose(0, 1),
        down_bias=leaves["down_bias_ED"],
        backend="reference",
    )
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.double())
    actual = run(case, "reference", torch.float64)
    assert_close("y", actual["y"], y)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(name, actual[f"d{name}"], grad)


def test_definition_is_the_equation() -> None:
    case = make(rows=5, parts=1, activation="relu", sentinels=0.3)
    t = {name: tensor.double() for name, tensor in case.tensors.items()}
    y = run(case, "reference", torch.float64)["y"]
    for r in range(5):
        expected = torch.zeros(DIM, dtype=torch.float64)
        for e, weight in zip(case.expert[r].tolist(), t["weight_RK"][r], strict=True):
            if e < len(WIDTHS):
                units = slice(sum(WIDTHS[:e]), sum(WIDTHS[: e + 1]))
                pre = t["up_MHD"][0, units] @ t["x_RD"][r] + t["up_bias_MH"][0, units]
                out = t["down_HD"][units].T @ pre.relu() + t["down_bias_ED"][e]
                expected += weight * out
        assert_close(f"row {r}", y[r], expected)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_products_match_the_definition(parts: int, bias: bool) -> None:
    assert_equal_to_definition(make(parts=parts, bias=bias))


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 0},
        {"rows": 1, "k": 1, "sentinels": 0.0},
        {"sentinels": 1.0},
        {"widths": (5,)},
        {"widths": (16, 32, 48)},
        {"widths": (1, 200)},
    ],
    ids=str,
)
def test_corners(shape: dict[str, object]) -> None:
    assert_equal_to_definition(make(**shape))


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    dim=st.integers(1, 30),
    widths=st.lists(st.integers(1, 50), min_size=1, max_size=5).map(tuple),
    k=st.integers(1, 3),
    parts=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_any_shape(**shape: object) -> None:
    assert_equal_to_definition(make(**shape))


def test_all_rows_to_the_widest_and_to_the_narrowest() -> None:
    for expert in (0, 1):
        case = make(sentinels=0.0)
        case.expert.fill_(expert)
        assert_equal_to_definition(case)


def test_idle_expert_has_zero_gradient() -> None:
    case = make()
    result = run(case, "block_sparse", torch.float32)
    idle = WIDTHS[0]
    assert result["ddown_HD"][idle].count_nonzero() == 0
    assert result["dup_MHD"][:, idle].count_nonzero() == 0
    assert result["ddown_bias_ED"][1].count_nonzero() == 0


def test_without_triton_the_definition_runs() -> None:
    case = make()
    expected = run(case, "reference", torch.float32)
    for name, actual in run(case, "auto", torch.float32).items():
        assert torch.equal(actual, expected[name]), name


def test_autocast() -> None:
    case = make()
    with torch.autocast("cpu", torch.float16):
        y = run(case, "block_sparse", torch.float32)["y"]
    assert y.dtype == torch.float32
    assert_close("y", y, run(case, "reference", torch.float64)["y"].float(), 2e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (40, 1, 16)}, r"up_MHD must have shape \(2, 57, 13\), got \(2, 97, 13\)"),
        ({"widths": ()}, "widths must be at least 1 each and of one expert or more"),
        ({"widths": (97, 0)}, "widths must be at least 1 each"),
        ({"backend": "blocksparse"}, "did you mean 'block_sparse'"),
        ({"down_HD": torch.zeros(97, 13).double()}, "x must have the experts' dtype"),
        ({"up_MHD": torch.zeros(4, 97, 13)}, "up must have 1 part, 2 if gated, or 3"),
        (
            {"up_MHD": torch.zeros(1, 97, 13), "activation": "clamped_swiglu"},
            "activation 'clamped_swiglu' is for gated experts",
        ),
    ],
)
def test_mistakes_are_named(change: dict[str, object], message: str) -> None:
    case = make(bias=False)
    arguments = {"expert_RK": case.expert, **case.tensors, "widths": WIDTHS, **change}
    with pytest.raises(ValueError, match=message):
        unequal_mlp(**arguments)
