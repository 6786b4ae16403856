"""The MLP families: shapes, initial values, printing, errors."""

import pytest
import torch

from expertmesh.experts import DoublyGatedMLPExperts, GatedMLPExperts, MLPExperts
from expertmesh.testing import assert_close

FAMILIES = [MLPExperts, GatedMLPExperts, DoublyGatedMLPExperts]
Family = type[MLPExperts] | type[GatedMLPExperts] | type[DoublyGatedMLPExperts]


def rows(num_rows: int = 9, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 8, generator=g)
    expert = torch.randint(0, 5, (num_rows, k), generator=g)
    return x, expert, torch.rand(num_rows, k, generator=g)


def test_shapes() -> None:
    mlp = MLPExperts(8, 12, 4, bias=True)
    shapes = {name: tuple(p.shape) for name, p in mlp.named_parameters()}
    assert shapes == {"up": (4, 12, 8), "down": (4, 8, 12), "up_bias": (4, 12), "down_bias": (4, 8)}
    gated = GatedMLPExperts(8, 12, 4, bias=True)
    shapes = {name: tuple(p.shape) for name, p in gated.named_parameters()}
    assert shapes == {
        "gate_up": (4, 2, 12, 8),
        "down": (4, 8, 12),
        "gate_up_bias": (4, 2, 12),
        "down_bias": (4, 8),
    }
    assert dict(GatedMLPExperts(8, 12, 4).named_parameters()).keys() == {"gate_up", "down"}
    doubly = DoublyGatedMLPExperts(8, 12, 4, bias=True)
    shapes = {name: tuple(p.shape) for name, p in doubly.named_parameters()}
    assert shapes == {
        "gates_up": (4, 3, 12, 8),
        "down": (4, 8, 12),
        "gates_up_bias": (4, 3, 12),
        "down_bias": (4, 8),
    }


def test_mlp_is_the_equation() -> None:
    experts = MLPExperts(8, 12, 4, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(experts.up_bias)
    torch.nn.init.normal_(experts.down_bias)
    x = torch.randn(1, 8, dtype=torch.float64)
    y = experts(x, torch.tensor([[2, 3]]), torch.tensor([[0.25, 0.75]], dtype=torch.float64))
    expected = 0
    for e, weight in ((2, 0.25), (3, 0.75)):
        hidden = torch.relu(experts.up[e] @ x[0] + experts.up_bias[e])
        expected = expected + weight * (experts.down[e] @ hidden + experts.down_bias[e])
    assert_close("y", y[0], expected)


def test_gated_gate_is_index_zero() -> None:
    experts = GatedMLPExperts(8, 12, 4, dtype=torch.float64)
    x = torch.randn(1, 8, dtype=torch.float64)
    y = experts(x, torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64))
    gate, up = experts.gate_up[1, 0] @ x[0], experts.gate_up[1, 1] @ x[0]
    assert_close("y", y[0], experts.down[1] @ (torch.nn.functional.silu(gate) * up))


def test_doubly_gated_is_linear_gate_up() -> None:
    experts = DoublyGatedMLPExperts(8, 12, 4, dtype=torch.float64)
    x = torch.randn(1, 8, dtype=torch.float64)
    y = experts(x, torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64))
    linear, gate, up = experts.gates_up[1] @ x[0]
    hidden = linear * torch.nn.functional.silu(gate) * up
    assert_close("y", y[0], experts.down[1] @ hidden)
    with pytest.raises(ValueError, match="'clamped_swiglu' is for gated experts, whose up has 2"):
        DoublyGatedMLPExperts(8, 12, 4, activation="clamped_swiglu")(*rows())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["loop", "grouped_mm", "gather", "auto"])
def test_backends_agree(family: Family, backend: str) -> None:
    reference = family(8, 12, 4, bias=True, seed=3, backend="reference")
    forced = family(8, 12, 4, bias=True, seed=3, backend=backend)
    assert_close("y", forced(*rows()), reference(*rows()))


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_values_follow_the_seed(family: Family) -> None:
    one, same, other = (family(8, 12, 4, seed=seed) for seed in (1, 1, 2))
    for name, value in one.named_parameters():
        assert torch.equal(value, same.get_parameter(name))
        assert not torch.equal(value, other.get_parameter(name))
        assert not torch.equal(value[0], value[1])


def test_initial_values_of_an_expert_do_not_depend_on_how_many_there_are() -> None:
    few, many = (GatedMLPExperts(8, 12, num, seed=1) for num in (2, 6))
    assert torch.equal(few.gate_up, many.gate_up[:2])
    assert torch.equal(few.down, many.down[:2])


def test_initial_standard_deviation() -> None:
    default = GatedMLPExperts(64, 256, 4, seed=0)
    assert default.gate_up.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert default.down.std().item() == pytest.approx(1 / 16, rel=0.02)
    small = GatedMLPExperts(64, 256, 4, seed=0, init_std=0.02)
    assert small.gate_up.std().item() == pytest.approx(0.02, rel=0.02)
    assert small.down.std().item() == pytest.approx(0.02, rel=0.02)


def test_no_seed_follows_torch() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(MLPExperts(8, 12, 4).up)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_meta_device_draws_nothing_and_gives_the_same_values_later(family: Family) -> None:
    state = torch.get_rng_state()
    later = family(8, 12, 4, bias=True, device="meta")
    with torch.device("meta"):
        in_context = family(8, 12, 4, bias=True)
    assert torch.equal(state, torch.get_rng_state())
    direct = family(8, 12, 4, bias=True, seed=5)
    for experts in (later, in_context):
        experts.to_empty(device="cpu").reset_parameters(5)
        for name, value in direct.named_parameters():
            assert torch.equal(value, experts.get_parameter(name)), name


def test_dtype() -> None:
    experts = GatedMLPExperts(8, 16, 4, dtype=torch.bfloat16, seed=0)
    x, expert, weight = rows()
    assert experts(x.bfloat16(), expert, weight).dtype == torch.bfloat16
    assert torch.equal(experts.down, GatedMLPExperts(8, 16, 4, seed=0).down.bfloat16())


def test_repr_says_what_it_is() -> None:
    text = repr(GatedMLPExperts(8, 12, 4, activation="gelu"))
    assert "num_experts=4, dim=8, hidden=12, activation=gelu, backend=auto" in text


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_width(family: Family) -> None:
    _, expert, weight = rows()
    with pytest.raises(ValueError, match=r"x has width 7.*built for rows of dim=8.*dim=7"):
        family(8, 12, 4)(torch.zeros(9, 7), expert, weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"init_std": -1.0}, "init_std must be a number >= 0 or None, got -1.0"),
        ({"activation": "swishh"}, "activation must be one of"),
        ({"activation": "clamped_swiglu"}, "'clamped_swiglu' is for gated experts.*one has 1"),
        ({"backend": "trition"}, "backend must be one of auto, .*; did you mean 'triton'"),
    ],
)
def test_bad_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPExperts(**{"dim": 8, "hidden": 12, "num_experts": 4, **arguments})


def test_forced_backend_that_cannot_run() -> None:
    experts = GatedMLPExperts(7, 12, 4, backend="grouped_mm")
    with pytest.raises(ValueError, match=r"'grouped_mm' cannot run this: dim must be a multiple"):
        experts(torch.zeros(1, 7), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
