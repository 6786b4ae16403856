"""Every backend against the definition: outputs and every gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.testing import assert_close
from tests.kernels.cases import (
    Case,
    assert_differentiable_once,
    assert_equal_to_reference,
    call,
    make_case,
    run,
)

FLOAT64 = ("loop", "gather")
ALL = (*FLOAT64, "grouped_mm")


def aligned(**changes: object) -> Case:
    """float32 with widths that grouped_mm takes."""
    return make_case(**{"dim": 8, "hidden": 12, "dtype": torch.float32, **changes})


def test_reference_is_the_equation() -> None:
    case = make_case(rows=4, k=2, gated=1, sentinels=0.3)
    y = run(case, "reference")["y"]
    for r in range(4):
        expected = torch.zeros(5, dtype=torch.float64)
        for e, w in zip(case.expert[r].tolist(), case.weight[r], strict=True):
            if e < 6:
                gate, linear = case.up[e] @ case.x[r] + case.up_bias[e]
                hidden = gate * torch.sigmoid(gate) * linear
                expected += w * (case.down[e] @ hidden + case.down_bias[e])
        assert_close(f"row {r}", y[r], expected)


def test_doubly_gated_reference_is_the_equation() -> None:
    case = make_case(rows=3, k=2, gated=2, bias=False, sentinels=0.0)
    y = run(case, "reference")["y"]
    for r in range(3):
        expected = torch.zeros(5, dtype=torch.float64)
        for e, w in zip(case.expert[r].tolist(), case.weight[r], strict=True):
            linear, gate, up = case.up[e] @ case.x[r]
            expected += w * (case.down[e] @ (linear * (gate * torch.sigmoid(gate)) * up))
        assert_close(f"row {r}", y[r], expected)


@pytest.mark.parametrize("backend", FLOAT64)
@pytest.mark.parametrize("gated", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_float64_matches_reference(backend: str, gated: int, bias: bool) -> None:
    assert_equal_to_reference(make_case(gated=gated, bias=bias), backend)


@pytest.mark.parametrize("gated", [0, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_mm_matches_reference(gated: int, bias: bool) -> None:
    assert_equal_to_reference(aligned(gated=gated, bias=bias), "grouped_mm")


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("gated", [1, 2])
def test_float32_with_many_rows(backend: str, gated: int) -> None:
    """More rows than a block of the loop, and widths where it takes oneDNN."""
    case = make_case(3000, 16, 24, 2, 2, gated=gated, dtype=torch.float32, sentinels=0.05)
    assert_equal_to_reference(case, backend)


@pytest.mark.parametrize("backend", FLOAT64)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9),
    dim=st.integers(1, 9),
    hidden=st.integers(1, 9),
    num_experts=st.integers(1, 7),
    k=st.integers(1, 4),
    gated=st.integers(0, 2),
    bias=st.booleans(),
    sentinels=st.sampled_from([0.0, 0.5, 1.0]),
    activation=st.sampled_from(["silu", "relu", "gelu", "gelu_tanh"]),
    seed=st.integers(0, 100),
)
def test_any_shape(backend: str, **shape: object) -> None:
    assert_equal_to_reference(make_case(**shape), backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 0},
        {"rows": 1},
        {"rows": 1, "k": 1, "sentinels": 0.0},
        {"rows": 0, "gated": 2},
        {"rows": 1, "gated": 2, "sentinels": 0.0},
        {"sentinels": 1.0, "gated": 2},
        {"num_experts": 1, "sentinels": 0.0},
        {"k": 1},
        {"sentinels": 1.0},
    ],
    ids=str,
)
def test_corners(backend: str, shape: dict[str, int | float]) -> None:
    assert_equal_to_reference(aligned(**shape), backend)


@pytest.mark.parametrize("backend", ALL)
def test_all_rows_to_one_expert_and_twice(backend: str) -> None:
    case = aligned(sentinels=0.0)
    assert_equal_to_reference(replace(case, expert=torch.full_like(case.expert, 2)), backend)


@pytest.mark.parametrize("backend", ["reference", *ALL])
def test_idle_expert_has_zero_gradient(backend: str) -> None:
    case = aligned()
    assert not (case.expert == 1).any()
    result = run(case, backend)
    for name in ("dup", "ddown", "dup_bias", "ddown_bias"):
        assert result[name][1].count_nonzero() == 0
        assert result[name].count_nonzero() > 0


@pytest.mark.parametrize("backend", ["reference", *ALL])
def test_sentinels_contribute_nothing_whatever_they_hold(backend: str) -> None:
    case = aligned(rows=6, k=2, sentinels=0.0)
    case.expert[0] = 6
    case.expert[1, 0] = 6
    clean = run(case, backend)
    x, weight = case.x.clone(), case.weight.clone()
    x[0] = float("nan")
    weight[0], weight[1, 0] = float("nan"), float("inf")
    dirty = run(replace(case, x=x, weight=weight), backend)
    for name, value in clean.items():
        assert torch.equal(value, dirty[name]), name
    assert clean["y"][0].count_nonzero() == 0
    assert clean["dx"][0].count_nonzero() == 0
    assert clean["dweight"][0].count_nonzero() == 0
    assert clean["dweight"][1, 0] == 0
    assert clean["dweight"][1, 1] != 0


@pytest.mark.parametrize("backend", ALL)
def test_large_values(backend: str) -> None:
    case = aligned(bias=False)
    assert_equal_to_reference(replace(case, x=case.x * 1e12, down=case.down * 1e-12), backend)


@pytest.mark.parametrize("backend", ["reference", *ALL])
@pytest.mark.parametrize("gated", [1, 2])
def test_same_bits_every_time(backend: str, gated: int) -> None:
    case = make_case(300, 16, 24, 6, 3, gated=gated, dtype=torch.float32)
    first, second = run(case, backend), run(case, backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("wanted", ["x", "weight", "up", "down", "up_bias", "down_bias"])
def test_one_gradient_alone(backend: str, wanted: str) -> None:
    case = aligned()
    leaves = {name: value.clone() for name, value in case.tensors.items()}
    leaves[wanted].requires_grad_()
    (grad,) = torch.autograd.grad(call(case, leaves, backend), leaves[wanted], case.dy)
    assert_close(wanted, grad, run(case, "reference")[f"d{wanted}"])


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("mm", "_linear_pointwise", "_grouped_mm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_unwanted_gradients_cost_no_product(backend: str) -> None:
    case = aligned(bias=False)
    counts = {}
    for wanted in ("x", "weight", "up", "down"):
        leaves = {name: value.clone() for name, value in case.tensors.items()}
        leaves[wanted].requires_grad_()
        y = call(case, leaves, backend)
        with CountProducts() as products:
            torch.autograd.grad(y, leaves[wanted], case.dy)
        counts[wanted] = products.count
    assert counts["down"] == counts["weight"]
    assert counts["x"] == counts["up"] == 2 * counts["weight"] > 0


@pytest.mark.parametrize("gated", [0, 1, 2])
def test_gradcheck(gated: int) -> None:
    case = make_case(4, 3, 2, 3, 2, gated=gated)
    leaves = {name: value.requires_grad_() for name, value in case.tensors.items()}

    def function(*values: torch.Tensor) -> torch.Tensor:
        return call(case, dict(zip(leaves, values, strict=True)), "loop")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_second_derivative_is_refused(backend: str) -> None:
    assert_differentiable_once(aligned(), backend)


@pytest.mark.parametrize("backend", ALL)
def test_custom_activation(backend: str) -> None:
    case = aligned()
    case = replace(case, activation=lambda x: torch.relu(x).square())
    assert_equal_to_reference(case, backend)
    assert_equal_to_reference(replace(case, activation=lambda x: x), backend)


@pytest.mark.parametrize("backend", ALL)
def test_strided_inputs(backend: str) -> None:
    case = aligned()
    strided = replace(
        case,
        x=case.x.t().contiguous().t(),
        weight=case.weight.t().contiguous().t(),
        expert=case.expert.t().contiguous().t(),
        dy=case.dy[:, :1].expand_as(case.dy),
    )
    assert_equal_to_reference(strided, backend)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("gated", [1, 2])
def test_autocast(backend: str, gated: int) -> None:
    case = make_case(64, 16, 24, 4, 2, gated=gated, dtype=torch.float32)
    expected = run(case, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(case, backend)
    for name, value in actual.items():
        assert value.dtype == torch.float32
        assert_close(name, value, expected[name], 2e-2)
    assert not torch.equal(actual["y"], expected["y"])


@pytest.mark.parametrize("backend", ALL)
def test_bfloat16_sums_choices_in_float32(backend: str) -> None:
    """Equal outputs of 1 weighted 1 and 64 times 1/512: lost if summed in bfloat16."""
    k, one = 65, torch.ones(1, 8, dtype=torch.bfloat16)
    up = torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    up[0, :, 0] = 1
    down = torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    down[0, :, 0] = 1
    weight = torch.full((1, k), 1 / 512)
    weight[0, 0] = 1
    y = moe_mlp(
        one,
        torch.zeros(1, k, dtype=torch.int64),
        weight,
        up,
        down,
        activation="relu",
        backend=backend,
    )
    assert y.dtype == torch.bfloat16
    assert y[0, 0].item() == 1.125


@pytest.mark.parametrize("backend", ["loop", "gather", "auto"])
@pytest.mark.parametrize("gated", [1, 2])
def test_compiles_as_one_graph(backend: str, gated: int) -> None:
    case = make_case(gated=gated, sentinels=0.2)
    expected = run(case, "reference")
    leaves = {name: value.requires_grad_() for name, value in case.tensors.items()}
    function = torch.compile(
        lambda: call(case, leaves, backend), backend="aot_eager", fullgraph=True
    )
    y = function()
    assert_close("y", y, expected["y"])
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for name, grad in zip(leaves, grads, strict=True):
        assert_close(name, grad, expected[f"d{name}"])


def test_compiles_grouped_mm_in_bfloat16() -> None:
    case = make_case(32, 8, 16, 4, 2, dtype=torch.bfloat16, bias=False)
    function = torch.compile(
        lambda: call(case, case.tensors, "grouped_mm"), backend="aot_eager", fullgraph=True
    )
    assert_close("y", function(), call(case, case.tensors, "grouped_mm"))


def test_meta_tensors_give_shapes() -> None:
    case = make_case().to(device="meta")
    assert run(case, "auto")["dup"].shape == case.up.shape


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same(use_reentrant: bool) -> None:
    case = make_case()
    leaves = {name: value.requires_grad_() for name, value in case.tensors.items()}
    y = torch.utils.checkpoint.checkpoint(
        lambda x: call(case, {**leaves, "x": x}, "loop"),
        leaves["x"],
        use_reentrant=use_reentrant,
    )
    y.backward(case.dy)
    expected = run(case, "loop")
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[f"d{name}"]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(13, 7)}, r"x must be \(rows, dim=5\), got \(13, 7\)"),
        ({"expert": torch.zeros(13, 2)}, r"expert ids must be integers of shape \(rows=13, k\)"),
        ({"expert": torch.full((13, 3), 7)}, r"between 0 and num_experts=6 .*got 7 to 7"),
        ({"expert": torch.full((13, 3), -1)}, "got -1 to -1"),
        ({"weight": torch.zeros(13, 2)}, r"weights must have shape \(13, 3\), got \(13, 2\)"),
        ({"down": torch.zeros(6, 7, 5)}, r"down must have shape \(6, 5, 7\)"),
        ({"up": torch.zeros(6, 4, 7, 5)}, r"up must be \(E, F, D\), \(E, 2, F, D\) if gated, or"),
        ({"x": torch.zeros(13, 5)}, "x must have the experts' dtype torch.float64"),
        ({"activation": "silo"}, "did you mean 'silu'"),
        ({"activation": torch.nn.PReLU()}, "activation must have no parameters"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(replace(make_case(), **change), "auto")


def test_saves_the_input_and_the_parts_alone() -> None:
    """What is kept between the passes: operands, integers of the grouping, and 3 F per choice."""
    case = make_case(rows=50, dim=4, hidden=32, k=2, gated=2, bias=False, sentinels=0.0)
    leaves = {name: value.requires_grad_() for name, value in case.tensors.items()}
    known = {value.untyped_storage().data_ptr() for value in leaves.values()}
    kept: dict[int, int] = {}

    def note(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if saved.is_floating_point() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        call(case, leaves, "loop")
    assert sum(kept.values()) == 50 * 2 * 3 * 32 * 8
