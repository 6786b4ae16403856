"""Rotary positions against multiplication of complex numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expertmesh.models.rotary import Rotation, rotate_halves, rotate_pairs
from expertmesh.testing import assert_close

THETA = 100.0


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Each pair as one complex number times ``exp(i position theta ** (-2 j / dim))``."""
    dim = x.shape[-1]
    speed = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = positions.double()[:, None, :, None] * speed
    return torch.view_as_real(
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(angle), angle)
    ).flatten(-2)


def to_pairs(x: Tensor) -> Tensor:
    """From halves to neighbours."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


@pytest.mark.parametrize(
    "positions", [torch.arange(5)[None], torch.tensor([[0, 0, 0, 1, 2], [7, 8, 9, 10, 1000]])]
)
@pytest.mark.parametrize(
    ("rotate", "as_pairs"), [(rotate_halves, to_pairs), (rotate_pairs, lambda x: x)]
)
def test_turns_pairs(
    positions: Tensor,
    rotate: Callable[[Tensor, Rotation], Tensor],
    as_pairs: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = rotate(x, Rotation.of(positions, 6, THETA, x.dtype))
    assert_close("turned", as_pairs(got), turned(as_pairs(x), positions))


@pytest.mark.parametrize("rotate", [rotate_halves, rotate_pairs])
def test_gradients_without_keeping_the_input(rotate: Callable[[Tensor, Rotation], Tensor]) -> None:
    x = torch.randn(2, 1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    rotation = Rotation.of(torch.arange(3)[None], 4, THETA, x.dtype)
    assert torch.autograd.gradcheck(lambda x: rotate(x, rotation), x)
    assert torch.autograd.gradgradcheck(lambda x: rotate(x, rotation), x)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate(x, rotation)
    assert {tensor.data_ptr() for tensor in kept} == {
        rotation.cos.data_ptr(),
        rotation.sin.data_ptr(),
    }


def test_narrow_types_are_turned_in_float32() -> None:
    x = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rotation = Rotation.of(torch.arange(4)[None], 8, THETA, x.dtype)
    wide = rotate_halves(x.float(), rotation)
    assert torch.equal(rotate_halves(x, rotation), wide.bfloat16())


def test_angles_are_never_narrower_than_float32() -> None:
    positions = torch.arange(4)[None]
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        rotation = Rotation.of(positions, 8, THETA, dtype)
        assert rotation.cos.dtype == rotation.sin.dtype == wide
        assert rotation.cos.shape == (1, 1, 4, 4)


def test_a_compiler_sees_one_operation() -> None:
    operation = torch.ops.expertmesh.cos_and_sin.default
    torch.library.opcheck(operation, (torch.arange(5)[None], 6, THETA, torch.float32))
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def angles(positions: Tensor) -> Tensor:
        return Rotation.of(positions, 6, THETA, torch.float32).cos

    assert torch.equal(angles(torch.zeros(1, 3, dtype=torch.int64)), torch.ones(1, 1, 3, 3))
    (targets,) = graphs
    assert "cos" not in {getattr(target, "__name__", "") for target in targets}
